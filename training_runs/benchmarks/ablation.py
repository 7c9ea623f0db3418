"""What each part of LBW-Guard-style's law is worth: the whole law, and the law without one part.

```
python -m lbw_rl.training_runs.benchmarks.ablation --out ablation
python -m lbw_rl.training_runs.benchmarks.ablation --seeds 1 --families mini-qwen2 --variants no-ramp
```

Runs of a family share weights and batches, and begin at each of the multiples of the rate that AdamW is tuned to there
(docs/benchmarks.md). The figure is the final held-out loss less that of the whole law at the same multiple and seed: above
0, the part pays. Beside it stands how flat the axis is without the part, the learning-rate sensitivity over those multiples:
two of them tell little of it, and some parts pay in nothing else. A run that ends no better than it began counts with its
initial loss. `results.json` holds all of it, and what is in `results.jsonl` is not run again: the same command goes on after
an interruption.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from lbw_rl.action import Action
from lbw_rl.cli.console import meter, out
from lbw_rl.controller import Context
from lbw_rl.controllers.lbw_guard import LBWGuard
from lbw_rl.envs.recipe import Recipe, load_recipe, override
from lbw_rl.envs.task import TrainingTask
from lbw_rl.governor import Governor
from lbw_rl.setpoint import falling
from lbw_rl.signals import Telemetry
from lbw_rl.training_runs.benchmarks.records import Rows, choose, fingerprint, machine, refuse_faults, run_missing
from lbw_rl.training_runs.folders import write_json
from lbw_rl.training_runs.grid import parse_multiplier
from lbw_rl.training_runs.intervals import mean_interval
from lbw_rl.training_runs.summary import lr_sensitivity
from lbw_rl.update_target import UpdateTarget

MULTIPLIERS = "1/30,30"
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "mini-qwen2": ("mini-qwen2", ("schedule.name=constant", "optimizer.lr=0.00212")),
    "mini-qwen2-1000": ("mini-qwen2", ("train.steps=1000", "schedule.name=wsd", "optimizer.lr=0.00212")),
    "mini-qwen2-50k": ("mini-qwen2-50k", ("schedule.name=constant", "optimizer.lr=0.00283")),
    "mini-qwen2-1m": ("mini-qwen2-1m", ("schedule.name=constant", "optimizer.lr=0.001")),
    "mini-llama-full": ("mini-llama-full", ("schedule.name=linear", "optimizer.lr=0.003")),
    "mini-qwen2-lora": ("mini-qwen2-lora", ("schedule.name=linear", "optimizer.lr=0.01")),
}
"""Families of the stress suite: recipe, and AdamW's tuned schedule and rate."""


class _WithTarget(LBWGuard):
    """The law with another target."""

    def __init__(self, kind: type[UpdateTarget]) -> None:
        self._kind = kind
        super().__init__()

    def reset(self, context: Context) -> None:
        super().reset(context)
        self._target = self._kind(context, self.displacement, self.steepness)


class _AnyHorizon(UpdateTarget):
    def __init__(self, context: Context, displacement: float, steepness: float) -> None:
        super().__init__(context, displacement, steepness)
        self._displacement = displacement / math.sqrt(300)


class _AnySteepness(UpdateTarget):
    def _permitted(self) -> float:
        return 1.0


class _NoRamp(UpdateTarget):
    def ratio(self, t: Telemetry) -> float:
        return super().ratio(replace(t, step=math.nan))


class _NoFall(UpdateTarget):
    def _shape(self, t: Telemetry) -> float:
        return super()._shape(replace(t, progress=math.nan))


class _NoSchedule(UpdateTarget):
    def _shape(self, t: Telemetry) -> float:
        return falling(t.progress)


class _Linear(UpdateTarget):
    def _shape(self, t: Telemetry) -> float:
        return min(max(0.0, 1.0 - t.progress), super()._shape(t))


class _OrdinaryAdapters(UpdateTarget):
    def __init__(self, context: Context, displacement: float, steepness: float) -> None:
        super().__init__(context, displacement, steepness)
        self._low_rank = False


class _UnknownHorizon(LBWGuard):
    """As in a run without a planned end."""

    def reset(self, context: Context) -> None:
        super().reset(replace(context, total_steps=None))

    def act(self, telemetry: Telemetry) -> Action:
        return super().act(replace(telemetry, progress=math.nan))


class _NoAlarms(LBWGuard):
    """Nothing is an alarm, so the caution stays 1."""

    def _alarm(self, t: Telemetry) -> tuple[str | None, dict[str, float]]:
        super()._alarm(t)
        return None, {}


class _NoSkips(LBWGuard):
    def _is_burst(self, grad_norm: float) -> bool:
        return False

    def _is_bad_batch(self, loss: float) -> bool:
        return False


VARIANTS: dict[str, tuple[str, Callable[[], LBWGuard]]] = {
    "whole": ("the law as it is", LBWGuard),
    "any-horizon": (
        "the level does not fall with the number of steps: 300 stand for all",
        lambda: _WithTarget(_AnyHorizon),
    ),
    "unknown-horizon": ("nobody says when the run ends: T = 1000, and the user's schedule alone", _UnknownHorizon),
    "any-steepness": ("every model takes the whole displacement", lambda: _WithTarget(_AnySteepness)),
    "adapters-as-others": ("low-rank factors are held as other matrices are", lambda: _WithTarget(_OrdinaryAdapters)),
    "no-fall": ("the target follows the user's schedule alone", lambda: _WithTarget(_NoFall)),
    "linear-fall": ("the target falls as 1 − p instead of its root", lambda: _WithTarget(_Linear)),
    "no-schedule": ("the target ignores the user's schedule", lambda: _WithTarget(_NoSchedule)),
    "no-ramp": ("the target is whole from the first step", lambda: _WithTarget(_NoRamp)),
    "own-momentum": (
        "momentum is left as the user set it, and the level knows it",
        lambda: LBWGuard(momentum_steps=1e9),
    ),
    "last-gain": ("the plant is identified from the last update alone", lambda: LBWGuard(half_life=0.01)),
    "slow-gain": ("the plant is identified over 16 updates", lambda: LBWGuard(half_life=16.0)),
    "no-alarms": ("loss spikes, overshoots and divergence are not acted on", _NoAlarms),
    "no-skips": ("bursts and bad batches are taken", _NoSkips),
}
"""Name → what is different, and the controller."""


@dataclass(frozen=True)
class Cell:
    """One run of the benchmark."""

    family: str
    variant: str
    multiplier: float
    recipe: Recipe

    @property
    def key(self) -> str:
        """What identifies its row: everything that decides the run."""
        return fingerprint([self.variant, self.multiplier, self.recipe.model_dump(mode="json")])

    def __str__(self) -> str:
        return f"{self.family} {self.variant} × {self.multiplier:.3g} seed {self.recipe.train.seed}"


def run_cell(cell: Cell) -> dict[str, Any]:
    """Trains once.

    Returns:
        The row: what was run, and the final held-out loss in nats per token, capped.

    Raises:
        RuntimeError: governance itself failed, so that this was no governed run.
    """
    task = TrainingTask(cell.recipe)
    initial = task.evaluate()
    governor = Governor(
        task.optimizer,
        VARIANTS[cell.variant][1](),
        authority=cell.recipe.authority,
        total_steps=task.total_steps,
        seed=cell.recipe.train.seed,
    )
    while task.step < task.total_steps:
        loss, grad_norm = task.backward()
        governor.observe(loss, grad_norm=grad_norm, tokens=task.tokens_per_step)
        task.advance()
    final = task.evaluate()
    governor.close()
    summary = governor.summary()
    refuse_faults(summary)
    diverged = not (math.isfinite(final) and final < initial)
    return {
        "family": cell.family,
        "variant": cell.variant,
        "multiplier": cell.multiplier,
        "seed": cell.recipe.train.seed,
        "final_loss": initial if diverged else final,
        "diverged": diverged,
        "skips": summary["skips"],
    }


def benchmark(
    out_dir: Path,
    families: Sequence[str],
    variants: Sequence[str],
    multipliers: Sequence[float],
    seeds: int,
    workers: int = 2,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Runs what `out_dir` lacks and writes results.json there.

    Args:
        out_dir: folder of the results.
        families: of `FAMILIES`.
        variants: of `VARIANTS`; the whole law always runs.
        multipliers: of each family's tuned rate.
        seeds: paired runs, numbered from 0.
        workers: processes, one torch thread each.
        progress: told (runs finished, runs in all, the latest).

    Returns:
        What results.json holds: machine, rows, and `effects`, one entry per family and variant (`effects`).
    """
    everyone = list(dict.fromkeys(["whole", *variants]))
    cells = [
        Cell(family, variant, multiplier, _recipe(family, multiplier, seed))
        for family in families
        for seed in range(seeds)
        for variant in everyone
        for multiplier in multipliers
    ]
    rows = run_missing(cells, run_cell, Rows(out_dir / "results.jsonl"), workers=workers, progress=progress)
    found = {"machine": machine(1), "rows": rows, "effects": effects(rows)}
    write_json(out_dir / "results.json", found)
    return found


def _recipe(family: str, multiplier: float, seed: int) -> Recipe:
    name, settings = FAMILIES[family]
    fixed = (f"train.lr_multiplier={multiplier}", f"train.seed={seed}", "train.threads=1")
    return override(load_recipe(name), [*settings, *fixed])


def effects(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What leaving a part out costs: per family and variant the mean difference of the final loss from the whole law's.

    Differences are paired by multiplier and seed; the interval is over seeds, each the mean over its multipliers.
    `sensitivity` is the learning-rate sensitivity without the part, `whole_sensitivity` with it, nats.
    """
    whole = {(r["family"], r["multiplier"], r["seed"]): r["final_loss"] for r in rows if r["variant"] == "whole"}
    found = []
    for family, variant in dict.fromkeys((r["family"], r["variant"]) for r in rows if r["variant"] != "whole"):
        by_seed: dict[int, list[float]] = {}
        of_both = [r for r in rows if (r["family"], r["variant"]) == (family, variant)]
        for r in of_both:
            difference = r["final_loss"] - whole[family, r["multiplier"], r["seed"]]
            by_seed.setdefault(r["seed"], []).append(difference)
        means = [fmean(values) for values in by_seed.values()]
        all_of_whole = [r for r in rows if (r["family"], r["variant"]) == (family, "whole")]
        found.append(
            {
                "family": family,
                "variant": variant,
                "difference": fmean(means),
                "interval": mean_interval(means),
                "sensitivity": _sensitivity(of_both),
                "whole_sensitivity": _sensitivity(all_of_whole),
                "seeds": len(means),
                "diverged": sum(r["diverged"] for r in of_both),
                "skips": sum(r["skips"] for r in of_both),
            }
        )
    return found


def _sensitivity(rows: Sequence[Mapping[str, Any]]) -> float:
    """Of the mean over seeds."""
    by_multiplier: dict[float, list[float]] = {}
    for r in rows:
        by_multiplier.setdefault(r["multiplier"], []).append(r["final_loss"])
    return lr_sensitivity(fmean(losses) for losses in by_multiplier.values())


def render(found: Mapping[str, Any]) -> Table:
    """Differences in nats, one column a family."""
    entries = {(e["family"], e["variant"]): e for e in found["effects"]}
    families = list(dict.fromkeys(family for family, _ in entries))
    head = ("variant", "what is different", *families)
    table = Table(
        *head,
        title="final loss less that of the whole law, nats: above 0, the part pays; then the LR sensitivity without it",
    )
    for variant in dict.fromkeys(variant for _, variant in entries):
        table.add_row(variant, VARIANTS[variant][0], *(_cell(entries.get((family, variant))) for family in families))
    return table


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    text = f"{entry['difference']:+.3f}"
    if entry["interval"]:
        text += f" [{entry['interval'][0]:+.3f}, {entry['interval'][1]:+.3f}]"
    text += f", {entry['sensitivity']:.3f} (whole {entry['whole_sensitivity']:.3f})"
    return text + (f", {entry['diverged']} diverged" if entry["diverged"] else "")


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder of the results (%(default)s)")
    parser.add_argument("--families", default=",".join(FAMILIES), help="of %(default)s")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="of %(default)s")
    parser.add_argument("--multipliers", default=MULTIPLIERS, help="of the tuned rate (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs per family, variant and multiplier (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes, one torch thread each (%(default)s)")
    args = parser.parse_args()
    try:
        families = choose(args.families, list(FAMILIES), "families")
        variants = choose(args.variants, list(VARIANTS), "variants")
        multipliers = [parse_multiplier(text) for text in args.multipliers.split(",")]
        for number, name in ((args.seeds, "seeds"), (args.workers, "workers")):
            if number < 1:
                raise ValueError(f"{name}: {number} must be at least 1")
    except ValueError as e:
        parser.error(str(e))
    with meter("ablation") as m:
        found = benchmark(args.out, families, variants, multipliers, args.seeds, args.workers, progress=m.update)
    out.print(render(found))


if __name__ == "__main__":
    main()
