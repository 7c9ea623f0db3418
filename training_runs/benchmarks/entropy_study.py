"""What each entropy estimator can tell: its values over healthy and unhealthy runs, and how well it separates them.

```
python -m lbw_rl.training_runs.benchmarks.entropy_study --out entropy-study --plots docs/images
python -m lbw_rl.training_runs.benchmarks.entropy_study --seeds 2 --cases mini-qwen2 --out quick
```

Every run is an ordinary one, observed through a `Governor` that does nothing but skip what is not finite. The figure is
the AUC: the probability that a smoothed entropy of an unhealthy run exceeds one of the healthy run of the same seed,
0.5 where the estimator is blind, 0 or 1 where one threshold tells them apart. `results.json` holds it all, and what is in
`results.jsonl` is not run again. `--cost` times the estimators instead.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from rich.table import Table

from lbw_rl.action import NEUTRAL, Action, Directive
from lbw_rl.cli.console import meter, out
from lbw_rl.controller import Context, Controller
from lbw_rl.entropy import ESTIMATORS
from lbw_rl.envs.recipe import Recipe, load_recipe, override
from lbw_rl.envs.task import TrainingTask
from lbw_rl.governor import Governor
from lbw_rl.signals import Telemetry
from lbw_rl.training_runs.benchmarks.records import Rows, choose, fingerprint, machine, refuse_faults, run_missing
from lbw_rl.training_runs.folders import write_json

BURST, BURST_EVERY, BURST_STEPS = 1e3, 50, 5
MEMORISED = 4
"""Batches that the overfitting run sees again and again."""
SMOOTHING = 3
SKIPPED = 50
"""First steps that are not judged: every run begins alike."""

REGIMES: dict[str, float | None] = {
    "healthy": None,
    "low-rate": 1 / 30,
    "high-rate": 30.0,
    "nan-burst": None,
    "overfitting": None,
}
"""Regime → multiple of the recipe's learning rate; None: the one at which the case's AdamW does best."""


@dataclass(frozen=True)
class Case:
    """A model that the study looks at.

    Attributes:
        recipe: name of the recipe.
        tuned: multiple of its learning rate at which AdamW with a constant schedule ends lowest, of 0.25, 0.33, 0.5, 0.67,
            1, 1.33, 2 and 3 as far as needed.
        changes: what is changed in the recipe.
    """

    recipe: str
    tuned: float
    changes: tuple[str, ...] = ()


CASES = {
    "mini-qwen2": Case("mini-qwen2", 0.67),
    "mini-llama": Case("mini-llama", 0.67),
    "qwen2-32": Case("mini-qwen2", 1.33, ("model.hidden_size=32", "model.intermediate_size=88")),
    "qwen2-128": Case(
        "mini-qwen2", 0.33, ("model.hidden_size=128", "model.intermediate_size=352", "model.num_layers=3")
    ),
}


class SkipNonFinite(Controller):
    """Leaves the run alone, but for updates that would end it."""

    name = "skip-non-finite"
    time_limit = None

    def reset(self, context: Context) -> None:
        """Keeps nothing."""

    def act(self, telemetry: Telemetry) -> Action:
        """Skips a step that is not finite."""
        return Action(directive=Directive.SKIP, regime="non-finite") if telemetry.nonfinite == 1 else NEUTRAL


def bursts(task: TrainingTask) -> None:
    """For five steps in every fifty one tensor's gradient is a thousand times too large; at the fifth it is NaN."""
    generator = torch.Generator().manual_seed(task.recipe.train.seed)
    matrices = [p for p in task.model.parameters() if p.ndim >= 2]
    victims = torch.randint(len(matrices), (task.total_steps // BURST_EVERY + 1,), generator=generator).tolist()
    for index, matrix in enumerate(matrices):

        def hook(gradient: torch.Tensor, index: int = index) -> torch.Tensor:
            number, within = divmod(task.step, BURST_EVERY)
            if victims[number] != index or not in_burst(task.step):
                return gradient
            return gradient * (math.nan if within == BURST_EVERY - 1 else BURST)

        matrix.register_hook(hook)


def in_burst(step: int) -> bool:
    """Whether a step of the regime `nan-burst` has one."""
    return step % BURST_EVERY >= BURST_EVERY - BURST_STEPS


def memorises(task: TrainingTask) -> None:
    """The run sees the same few batches over and over: its training loss falls, its held-out loss rises."""
    seen: list[torch.Tensor] = []

    def again(
        model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not model.training:
            return None
        if len(seen) < MEMORISED:
            seen.append(kwargs["input_ids"])
        tokens = seen[task.step % len(seen)]
        return args, {**kwargs, "input_ids": tokens, "labels": tokens}

    task.model.register_forward_pre_hook(again, with_kwargs=True)


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    case: str
    regime: str
    recipe: Recipe

    @property
    def key(self) -> str:
        """What identifies its row."""
        severity = (BURST, BURST_EVERY, BURST_STEPS, MEMORISED)
        return fingerprint([self.case, self.regime, severity, self.recipe.model_dump(mode="json")])

    def __str__(self) -> str:
        return f"{self.case} {self.regime} seed {self.recipe.train.seed}"


def run_cell(cell: Cell) -> dict[str, Any]:
    """Trains once and notes every estimator at every step.

    Returns:
        The row: case, regime, seed, parameters, held-out loss before and after, and per estimator its values.

    Raises:
        RuntimeError: governance itself failed.
    """
    task = TrainingTask(cell.recipe)
    if cell.regime == "nan-burst":
        bursts(task)
    elif cell.regime == "overfitting":
        memorises(task)
    initial = task.evaluate()
    noted: dict[str, list[float | None]] = {name: [] for name in ESTIMATORS}
    losses = []
    authority = cell.recipe.authority.model_copy(update={"max_skips": task.total_steps})
    with Governor(task.optimizer, SkipNonFinite(), authority=authority, measure_device=False) as governor:
        while task.step < task.total_steps:
            loss, _ = task.backward()
            governor.observe(loss)
            task.advance()
            losses.append(float(loss))
            for name, (signal, _) in ESTIMATORS.items():
                value = getattr(governor.last_telemetry, signal)
                noted[name].append(value if math.isfinite(value) else None)
        refuse_faults(governor.summary())
    return {
        "case": cell.case,
        "regime": cell.regime,
        "seed": cell.recipe.train.seed,
        "parameters": sum(p.numel() for p in task.model.parameters()),
        "initial_loss": initial,
        "final_loss": task.evaluate(),
        "final_train_loss": fmean(losses[-20:]),
        "entropy": noted,
        "corpus_sha256": task.corpus_sha256,
    }


def judged(row: dict[str, Any], estimator: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The values of a run that count: smoothed, without the beginning; of a burst those within bursts, as they are."""
    values = np.array([math.nan if v is None else v for v in row["entropy"][estimator]])
    steps = np.arange(values.size)
    if row["regime"] == "nan-burst":
        chosen = values[(steps >= SKIPPED - BURST_STEPS) & np.array([in_burst(int(s)) for s in steps])]
    else:
        chosen = np.convolve(values, np.full(SMOOTHING, 1 / SMOOTHING), "valid")[SKIPPED:]
    return chosen[np.isfinite(chosen)]


def auc(unhealthy: np.ndarray[Any, Any], healthy: np.ndarray[Any, Any]) -> float:
    """P(unhealthy > healthy) + P(equal)/2 over all pairs: the area under the ROC curve."""
    from scipy.stats import mannwhitneyu

    statistic = mannwhitneyu(unhealthy, healthy).statistic
    return float(statistic) / (unhealthy.size * healthy.size)


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per case and estimator.

    `auc`: regime → mean over seeds, `auc_range` its range; `separation`: the smallest distance of any regime's AUC from
    1/2, times two (1: each regime is told apart by one threshold, 0: one of them not at all). `healthy`, `healthy_std`:
    median of the healthy runs over steps and its standard deviation over seeds.
    """
    by = {(r["case"], r["regime"], r["seed"]): r for r in rows}
    entries = []
    for case in dict.fromkeys(r["case"] for r in rows):
        seeds = [s for c, regime, s in by if (c, regime) == (case, "healthy")]
        for estimator in ESTIMATORS:
            areas = {
                regime: [
                    auc(judged(by[case, regime, s], estimator), judged(by[case, "healthy", s], estimator))
                    for s in seeds
                    if (case, regime, s) in by
                ]
                for regime in REGIMES
                if regime != "healthy"
            }
            medians = [median(judged(by[case, "healthy", s], estimator)) for s in seeds]
            entries.append(
                {
                    "case": case,
                    "parameters": by[case, "healthy", seeds[0]]["parameters"],
                    "estimator": estimator,
                    "seeds": len(seeds),
                    "auc": {regime: fmean(v) for regime, v in areas.items()},
                    "auc_range": {regime: [min(v), max(v)] for regime, v in areas.items()},
                    "separation": min(abs(2 * fmean(v) - 1) for v in areas.values()),
                    "healthy": median(medians),
                    "healthy_std": float(np.std(medians)),
                }
            )
    return entries


def study(
    folder: str | Path,
    *,
    cases: Sequence[str] = tuple(CASES),
    seeds: int = 5,
    settings: Sequence[str] = (),
    workers: int = 2,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Runs every regime of every case and writes `results.json`; finished runs of the folder are kept.

    Args:
        folder: for `results.jsonl`, one line a run, and `results.json`.
        cases: names of `CASES`.
        seeds: runs per regime, numbered from the recipe's own seed.
        settings: changes to every recipe, `key=value`.
        workers: processes, one torch thread each.
        progress: told (runs finished, runs in all, the latest).

    Returns:
        The content of `results.json`; its rows are those of `results.jsonl`.

    Raises:
        ValueError: an unknown case, a count below 1, or settings that cannot be used.
    """
    for number, name in ((seeds, "seeds"), (workers, "workers")):
        if number < 1:
            raise ValueError(f"{name}: {number} must be at least 1")
    cells = [
        Cell(case, regime, _recipe_of(case, regime, seed, settings))
        for case in choose(",".join(cases), list(CASES), "cases")
        for seed in range(seeds)
        for regime in REGIMES
    ]
    folder = Path(folder)
    rows = Rows(folder / "results.jsonl")
    finished = run_missing(cells, run_cell, rows, workers=workers, progress=progress)
    results = {
        "benchmark": "entropy-study",
        "machine": machine(threads=1),
        "settings": {"cases": list(cases), "seeds": seeds, "set": list(settings), "smoothing": SMOOTHING},
        "summary": summarise(finished),
        "rows": finished,
    }
    write_json(folder / "results.json", results)
    return results


def _recipe_of(case: str, regime: str, seed: int, settings: Sequence[str]) -> Recipe:
    chosen = CASES[case]
    multiplier = REGIMES[regime] or chosen.tuned
    fixed = [f"train.lr_multiplier={multiplier!r}", f"train.seed={seed}", "train.threads=1"]
    return override(load_recipe(chosen.recipe), ["schedule.name=constant", *chosen.changes, *settings, *fixed])


def cost(calls: int = 2000) -> dict[str, float]:
    """Median microseconds of each estimator on a sample of 4,096 elements, two estimators never side by side."""
    from lbw_rl.entropy import Sampled
    from lbw_rl.sample import SAMPLE_SIZE

    rng = np.random.default_rng(0)
    gradient, mean = (1e-3 * rng.standard_t(3, SAMPLE_SIZE).astype(np.float32) for _ in range(2))
    starts = np.linspace(0, SAMPLE_SIZE, 44, endpoint=False).astype(np.intp)
    sampled = Sampled(gradient, mean, starts, np.ones(44, np.float32))
    times: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
    for _ in range(calls):
        for name, (_, estimate) in ESTIMATORS.items():
            start = time.perf_counter()
            estimate(sampled)
            times[name].append(time.perf_counter() - start)
    return {name: 1e6 * median(seconds) for name, seconds in times.items()}


def table(results: dict[str, Any]) -> Table:
    """The summary, one line per case and estimator."""
    regimes = [r for r in REGIMES if r != "healthy"]
    shown = Table(title="AUC against the healthy run of the same seed: mean over seeds")
    for name in ("case", "estimator"):
        shown.add_column(name, no_wrap=True)
    for name in ("healthy", "± seeds", *regimes, "separation"):
        shown.add_column(name, justify="right", no_wrap=True)
    last = None
    for e in results["summary"]:
        if last not in (None, e["case"]):
            shown.add_section()
        last = e["case"]
        areas = [f"{e['auc'][r]:.2f}" for r in regimes]
        healthy = f"{e['healthy']:.4f}", f"{e['healthy_std']:.4f}"
        shown.add_row(e["case"], e["estimator"], *healthy, *areas, f"{e['separation']:.2f}")
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study, prints its table and draws its pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/entropy-study"), help="folder of the results (%(default)s)"
    )
    parser.add_argument("--cases", default=",".join(CASES), help="of %(default)s")
    parser.add_argument("--seeds", type=int, default=5, help="runs per regime (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes, one torch thread each (%(default)s)")
    parser.add_argument("--plots", type=Path, help="folder to draw the pictures into")
    parser.add_argument("--cost", action="store_true", help="time the estimators instead")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes every recipe")
    args = parser.parse_args(arguments)
    if args.cost:
        for name, microseconds in cost().items():
            out.print(f"{name:<10} {microseconds:6.1f} µs")
        return
    try:
        cases = choose(args.cases, list(CASES), "cases")
        with meter("entropy study") as bar:
            results = study(
                args.out, cases=cases, seeds=args.seeds, settings=args.set, workers=args.workers, progress=bar.update
            )
    except ValueError as error:
        parser.error(str(error))
    out.print(table(results))
    if args.plots is not None:
        from lbw_rl.training_runs.benchmarks.entropy_figures import draw  # needs matplotlib

        for path in draw(results, args.plots):
            out.print(f"{path}")
    out.print(f"{args.out / 'results.json'}")


if __name__ == "__main__":
    main()
