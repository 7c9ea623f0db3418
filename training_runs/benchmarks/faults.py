"""What a fault in the middle of a run costs it, with and without governance.

```
python -m lbw_rl.training_runs.benchmarks.faults --out faults
python -m lbw_rl.training_runs.benchmarks.faults --seeds 1 --faults nan-gradient --arms adamw,lbw-guard
```

Every arm meets every fault with the same weights, the same batches and the same seeds. The figure is the final
held-out perplexity over that of the same arm and seed without a fault: 1 is a run that the fault did not hurt.
A run that ends no better than it began counts as diverged, at the initial loss. `results.json` holds it all, and
what is in `results.jsonl` is not run again: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table

from lbw_rl.cli.console import meter, out
from lbw_rl.envs.recipe import Recipe, load_recipe, override
from lbw_rl.envs.task import TrainingTask
from lbw_rl.governor import Governor
from lbw_rl.last_good import HEALTHY_REGIMES
from lbw_rl.training_runs import compare
from lbw_rl.training_runs.benchmarks.records import (
    Rows,
    choose,
    fingerprint,
    machine,
    median_interval,
    refuse_faults,
    run_missing,
)
from lbw_rl.training_runs.folders import write_json
from lbw_rl.training_runs.intervals import judge

FAULT_AT = 0.5
"""Share of the run after which the fault happens."""
BURST = 1e3
"""What `gradient-burst` multiplies the gradients by."""
CORRUPTED_BATCHES = 10
"""Consecutive steps whose tokens `corrupted-batches` replaces."""
LR_JUMP = 100.0
"""What `lr-jump` multiplies the base learning rate by, until the end of the run."""
RECOVERED = 1.05
"""A run within this factor of its fault-free perplexity has recovered."""
TUNED = "constant:0.67"
"""Schedule and multiple of the learning rate at which AdamW does best on `mini-qwen2` and python-docs
(docs/benchmarks.md)."""

Fault = Callable[[TrainingTask], None]
"""Called once, between two steps: from the step `task.step` on, the fault is there."""


def no_fault(task: TrainingTask) -> None:
    """Nothing happens."""


def nan_gradient(task: TrainingTask) -> None:
    """One step's gradient of the model's first parameter, the token embedding, is NaN.

    A tensor hook, so that it is there before anybody measures or clips; clipping by the global norm then spreads
    it to all gradients, as it does in practice.
    """
    at = task.step
    first = next(p for p in task.model.parameters() if p.requires_grad)
    first.register_hook(lambda gradient: torch.full_like(gradient, math.nan) if task.step == at else gradient)


def gradient_burst(task: TrainingTask) -> None:
    """One step's gradients are `BURST` times what they were, before anybody measures or clips them."""
    at = task.step
    for parameter in task.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient * BURST if task.step == at else gradient)


def corrupted_batches(task: TrainingTask) -> None:
    """The tokens of `CORRUPTED_BATCHES` steps, inputs and labels, are uniform random ones; the others stay."""
    end = task.step + CORRUPTED_BATCHES
    vocabulary = int(task.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    generator = torch.Generator().manual_seed(task.recipe.train.seed)  # its own: no other random number may change

    def corrupt(
        model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not model.training or task.step >= end:  # held-out text is read in evaluation mode
            return None
        tokens = torch.randint(vocabulary, kwargs["input_ids"].shape, generator=generator).to(task.device)
        return args, {**kwargs, "input_ids": tokens, "labels": tokens}

    task.model.register_forward_pre_hook(corrupt, with_kwargs=True)


def lr_jump(task: TrainingTask) -> None:
    """The base learning rate is `LR_JUMP` times what it was, until the end; the schedule goes on from there."""
    task.scheduler.base_lrs = [lr * LR_JUMP for lr in task.scheduler.base_lrs]
    for group in task.optimizer.param_groups:
        group["lr"] *= LR_JUMP


def optimizer_zeroed(task: TrainingTask) -> None:
    """The optimizer's moments are zero while its step count is kept, as after a botched restore."""
    for state in task.optimizer.state.values():
        for name, value in state.items():
            if name != "step" and isinstance(value, torch.Tensor):
                value.zero_()


FAULTS: dict[str, Fault] = {
    "none": no_fault,
    "nan-gradient": nan_gradient,
    "gradient-burst": gradient_burst,
    "corrupted-batches": corrupted_batches,
    "lr-jump": lr_jump,
    "optimizer-zeroed": optimizer_zeroed,
}


@dataclass(frozen=True)
class Arm:
    """One contender.

    Attributes:
        settings: what it changes in the recipe.
        controller: who governs; `None`: nobody, and no hook is on the optimizer.
        tuned: whether it gets AdamW's best schedule and learning rate instead of the recipe's.
    """

    settings: tuple[str, ...] = ()
    controller: str | None = None
    tuned: bool = False


_CLIP = ("optimizer.grad_clip=1.0",)
_WITH_ROLLBACKS = (
    "authority.lr_scale=[0.001, 100.0]",
    "authority.momentum_scale=[0.5, 2.0]",
    "authority.max_rollbacks=3",
)
ARMS = {
    "adamw": Arm(),
    "adamw+clip": Arm(_CLIP),
    "adamw-tuned": Arm(tuned=True),
    "adamw-tuned+clip": Arm(_CLIP, tuned=True),
    "lbw-guard": Arm(_WITH_ROLLBACKS, controller="lbw-guard"),
}


@dataclass(frozen=True)
class Cell:
    """One run of the benchmark."""

    fault: str
    arm: str
    recipe: Recipe
    controller: str | None

    @property
    def key(self) -> str:
        """What identifies its row: everything that decides the run."""
        severity = (FAULT_AT, BURST, CORRUPTED_BATCHES, LR_JUMP)
        return fingerprint([self.fault, severity, self.arm, self.controller, self.recipe.model_dump(mode="json")])

    def __str__(self) -> str:
        return f"{self.fault} {self.arm} seed {self.recipe.train.seed}"


def run_cell(cell: Cell) -> dict[str, Any]:
    """Trains once, with the fault at `FAULT_AT` of the run.

    Returns:
        The row: what was run, the capped final loss (nats per token) and perplexity, and what governance did.
        `events` are its decisions other than healthy ones, as [first step, last step, regime, directive].

    Raises:
        RuntimeError: governance itself failed, so that this was no governed run.
    """
    task = TrainingTask(cell.recipe)
    initial = task.evaluate()
    governor = None
    if cell.controller is not None:
        governor = Governor(
            task.optimizer,
            cell.controller,
            authority=cell.recipe.authority,
            total_steps=task.total_steps,
            seed=cell.recipe.train.seed,
        )
    at = int(FAULT_AT * task.total_steps)
    events: list[list[Any]] = []
    start = time.perf_counter()
    while task.step < task.total_steps:
        if task.step == at:
            FAULTS[cell.fault](task)
        step = task.step
        loss, grad_norm = task.backward()
        if governor is not None:
            governor.observe(loss, grad_norm=grad_norm, tokens=task.tokens_per_step)
        task.advance()
        if governor is not None:
            _note(events, step, governor)
    seconds = time.perf_counter() - start
    final = task.evaluate()
    diverged = not (math.isfinite(final) and final < initial)
    capped = initial if diverged else final
    row: dict[str, Any] = {
        "fault": cell.fault,
        "arm": cell.arm,
        "seed": cell.recipe.train.seed,
        "steps": task.total_steps,
        "fault_step": at,
        "initial_loss": initial,
        "final_loss": capped,
        "final_ppl": math.exp(capped),
        "diverged": diverged,
        "seconds": seconds,
        "corpus_sha256": task.corpus_sha256,
        "governor": None,
    }
    if governor is not None:
        governor.close()
        summary = governor.summary()
        refuse_faults(summary)
        row["governor"] = {**summary, "events": events}
    return row


def _note(events: list[list[Any]], step: int, governor: Governor) -> None:
    action = governor.last_ruling.action
    what = [action.regime, str(action.directive)]
    if action.regime in HEALTHY_REGIMES:
        return
    if events and events[-1][1] == step - 1 and events[-1][2:] == what:
        events[-1][1] = step
    else:
        events.append([step, step, *what])


def benchmark(
    recipe: Recipe,
    folder: str | Path,
    *,
    faults: Sequence[str] = tuple(FAULTS),
    arms: Sequence[str] = tuple(ARMS),
    seeds: int = 10,
    workers: int = 2,
    tuned: str = TUNED,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Runs every arm under every fault and writes `results.json`; finished runs of the folder are kept.

    Args:
        recipe: what to train.
        folder: for `results.jsonl`, one line a run, and `results.json`.
        faults: names of `FAULTS`; `none`, against which the others are measured, is always run.
        arms: names of `ARMS`.
        seeds: runs per fault and arm, numbered from the recipe's own seed.
        workers: processes, one torch thread each.
        tuned: SCHEDULE:MULTIPLIER of the tuned arms.
        progress: told (runs finished, runs in all, the latest) after every run.

    Returns:
        The content of `results.json`.

    Raises:
        ValueError: an unknown fault or arm, or settings that cannot be used.
    """
    for number, name in ((seeds, "seeds"), (workers, "workers")):
        if number < 1:
            raise ValueError(f"{name}: {number} must be at least 1")
    faults = choose(",".join(["none", *faults]), list(FAULTS), "faults")
    arms = choose(",".join(arms), list(ARMS), "arms")
    # Seed by seed, so that a benchmark cut short holds complete pairs.
    cells = [
        Cell(fault, arm, _recipe_of(recipe, ARMS[arm], seed, tuned), ARMS[arm].controller)
        for seed in range(recipe.train.seed, recipe.train.seed + seeds)
        for fault in faults
        for arm in arms
    ]
    folder = Path(folder)
    rows = Rows(folder / "results.jsonl")
    finished = run_missing(cells, run_cell, rows, workers=workers, progress=progress)
    results = {
        "benchmark": "faults",
        "machine": machine(threads=1),
        "settings": {
            "recipe": recipe.model_dump(mode="json"),
            "tuned": tuned,
            "seeds": seeds,
            "workers": workers,
            "fault_at": FAULT_AT,
            "gradient_burst": BURST,
            "corrupted_batches": CORRUPTED_BATCHES,
            "lr_jump": LR_JUMP,
            "recovered": RECOVERED,
        },
        "summary": summarise(finished),
        "rows": finished,
    }
    write_json(folder / "results.json", results)
    return results


def _recipe_of(recipe: Recipe, arm: Arm, seed: int, tuned: str) -> Recipe:
    settings = [*arm.settings, f"train.seed={seed}", "train.threads=1"]
    if arm.tuned:
        schedule, _, multiplier = tuned.partition(":")
        settings += [f"schedule.name={schedule}", f"train.lr_multiplier={compare.parse_multiplier(multiplier)!r}"]
    return override(recipe, settings)


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per fault and arm, over the seeds that have a fault-free run as well.

    `ratio` is the final perplexity over the fault-free one of the same arm and seed: its median, the median's 95 %
    interval, its worst, and how many seeds stay within `RECOVERED`. `against` compares the final losses of
    `lbw-guard` with this arm's under the same fault, paired by seed (below 1: `lbw-guard` ends better).
    """
    losses = {(row["fault"], row["arm"], row["seed"]): row["final_loss"] for row in rows}
    entries = []
    for fault, arm in dict.fromkeys((row["fault"], row["arm"]) for row in rows):
        own = [r for r in rows if (r["fault"], r["arm"]) == (fault, arm) and ("none", arm, r["seed"]) in losses]
        ratios = [math.exp(r["final_loss"] - losses["none", arm, r["seed"]]) for r in own]
        governed = [
            losses[fault, "lbw-guard", r["seed"]] - r["final_loss"]
            for r in own
            if arm != "lbw-guard" and (fault, "lbw-guard", r["seed"]) in losses
        ]
        governance = [r["governor"] for r in own if r["governor"] is not None]
        entries.append(
            {
                "fault": fault,
                "arm": arm,
                "seeds": len(own),
                "ratio": median(ratios),
                "interval_95": median_interval(ratios),
                "worst": max(ratios),
                "recovered": sum(ratio <= RECOVERED for ratio in ratios),
                "diverged": sum(r["diverged"] for r in own),
                "final_ppl": median(r["final_ppl"] for r in own),
                "skips": sum(g["skips"] for g in governance) if governance else None,
                "rollbacks": sum(g["rollbacks"] for g in governance) if governance else None,
                "against": judge(governed),
            }
        )
    return entries


def table(results: dict[str, Any]) -> Table:
    """The summary, one line per fault and arm."""
    shown = Table(title="final held-out perplexity / the same arm's and seed's without the fault")
    for name in ("fault", "arm"):
        shown.add_column(name, no_wrap=True)
    for name in ("median", "95 %", "worst", f"≤ {RECOVERED:g}", "diverged", "perplexity", "skips", "rollbacks"):
        shown.add_column(name, justify="right", no_wrap=True)
    last = None
    for entry in results["summary"]:
        if last not in (None, entry["fault"]):
            shown.add_section()
        last = entry["fault"]
        interval = entry["interval_95"]
        counts = ["" if entry[name] is None else str(entry[name]) for name in ("skips", "rollbacks")]
        shown.add_row(
            entry["fault"],
            entry["arm"],
            f"{entry['ratio']:.3f}",
            f"[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "",
            f"{entry['worst']:.3f}",
            f"{entry['recovered']}/{entry['seeds']}",
            f"{entry['diverged']}/{entry['seeds']}",
            f"{entry['final_ppl']:.1f}",
            *counts,
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/faults"), help="folder of the results (%(default)s)")
    parser.add_argument("--seeds", type=int, default=10, help="runs per fault and arm (%(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run; default: the recipe's")
    parser.add_argument("--workers", type=int, default=2, help="processes, one torch thread each (%(default)s)")
    parser.add_argument("--recipe", default="mini-qwen2", help="name or TOML file (%(default)s)")
    parser.add_argument("--faults", default=",".join(FAULTS), help="of %(default)s")
    parser.add_argument("--arms", default=",".join(ARMS), help="of %(default)s")
    parser.add_argument("--tuned", default=TUNED, help="SCHEDULE:MULTIPLIER of the tuned arms (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes the recipe")
    args = parser.parse_args(arguments)
    try:
        steps = [] if args.steps is None else [f"train.steps={args.steps}"]
        recipe = override(load_recipe(args.recipe), [*args.set, *steps])
        faults, arms = choose(args.faults, list(FAULTS), "faults"), choose(args.arms, list(ARMS), "arms")
        with meter("faults") as bar:
            results = benchmark(
                recipe,
                args.out,
                faults=faults,
                arms=arms,
                seeds=args.seeds,
                workers=args.workers,
                tuned=args.tuned,
                progress=bar.update,
            )
    except ValueError as error:
        parser.error(str(error))
    out.print(table(results))
    out.print(f"{args.out / 'results.json'}")


if __name__ == "__main__":
    main()
