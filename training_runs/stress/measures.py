"""The figures of merit of one family: every contender against the tuned baseline, paired by seed.

A run that diverged counts with its loss capped at the untrained model's; none is left out. The reference is AdamW at
the schedule and rate that a search found for it, and if another multiplier of the grid served it better, there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbw_rl.training_runs.intervals import Interval, judge, seed_interval
from lbw_rl.training_runs.results import Row
from lbw_rl.training_runs.run import RECIPE
from lbw_rl.training_runs.stress.records import Records
from lbw_rl.training_runs.summary import UNGOVERNED, capped, lr_sensitivity


@dataclass(frozen=True)
class Reference:
    """The tuned baseline of a family.

    Attributes:
        arm: its label.
        multiplier: where it is best.
        losses: seed → final loss (capped), nats per token.
        steps: seed → steps until it first was at its own final loss, of the seeds whose metrics are whole.
        step_seconds: the arm's time a step; None if it is not known.
    """

    arm: str
    multiplier: float
    losses: dict[int, float]
    steps: dict[int, float]
    step_seconds: float | None


def measure(rows: Sequence[Row], folder: Path, reference_arm: str) -> dict[str, Any]:
    """All measures of one family, as JSON data.

    Args:
        rows: the runs of one recipe, over arms, multipliers and seeds.
        folder: that the rows' folders are relative to.
        reference_arm: the arm of the tuned baseline.

    Returns:
        `reference` (arm, multiplier, loss, ppl), `arms`, a dict each, and `lacking`, the runs that left incomplete
        records. Losses in nats per token, ratios are of perplexities, steps or seconds to the reference's; None is what
        cannot be had, and for a target that most seeds never reached `steps_ratio` and `seconds_ratio` are None with
        `reached` below `timed`, the seeds whose records tell. Where no record tells, they are left out.
    """
    table = _by_arm(rows)
    records = Records(folder, rows)
    # Of all runs of an arm, since they are spread over the time that the suite takes.
    speed = {arm: records.step_seconds([r for at in cells.values() for r in at]) for arm, cells in table.items()}
    reference = _reference(table[reference_arm], reference_arm, records, speed[reference_arm])
    loss = fmean(reference.losses.values())
    arms = [
        {
            "arm": arm,
            "optimizer": next(iter(cells.values()))[0].optimizer,
            "controller": next(iter(cells.values()))[0].controller,
            **_over_the_axis(cells, reference),
            **(_at_base(cells[1.0], reference, folder, records, speed[arm]) if 1.0 in cells else {}),
        }
        for arm, cells in table.items()
    ]
    return {
        "reference": {
            "arm": reference.arm,
            "multiplier": reference.multiplier,
            "loss": loss,
            "ppl": math.exp(min(loss, 700.0)),
        },
        "arms": arms,
        "lacking": records.lacking,
    }


_Cells = dict[float, list[Row]]


def _by_arm(rows: Sequence[Row]) -> dict[str, _Cells]:
    table: dict[str, _Cells] = {}
    for row in rows:
        table.setdefault(row.arm, {}).setdefault(row.lr_multiplier, []).append(row)
    return table


def _reference(cells: _Cells, arm: str, records: Records, speed: float | None) -> Reference:
    means = {m: fmean(capped(r) for r in rows) for m, rows in cells.items()}
    best = min(means, key=lambda m: (means[m], abs(math.log(m))))
    steps = {row.seed: records.steps_to(row, capped(row)) for row in cells[best]}
    known = {seed: taken for seed, taken in steps.items() if taken is not None}
    return Reference(arm, best, {row.seed: capped(row) for row in cells[best]}, known, speed)


def losses_by_seed(cells: _Cells, seeds: Sequence[int]) -> NDArray[np.float64]:
    """Capped final losses, shape (seeds, multipliers), of the multipliers in order.

    Raises:
        KeyError: a seed that a multiplier lacks.
    """
    columns = [{row.seed: capped(row) for row in cells[m]} for m in sorted(cells)]
    return np.array([[column[seed] for column in columns] for seed in seeds])


def sensitivity(losses: NDArray[np.float64]) -> tuple[float, Interval | None]:
    """LR sensitivity of the mean over seeds (nats, ≥ 0; see `lr_sensitivity`), and its bootstrap interval over seeds.

    Args:
        losses: capped final losses, shape (seeds, multipliers).
    """
    interval = seed_interval(losses, lambda means: means.mean(axis=-1) - means.min(axis=-1))
    return lr_sensitivity(float(v) for v in losses.mean(axis=0)), interval


def worst_ratio(losses: NDArray[np.float64], reference: NDArray[np.float64]) -> tuple[float, int, Interval | None]:
    """Perplexity at the worst multiplier as a multiple of the reference's, which multiplier it is, and the interval.

    Args:
        losses: capped final losses, shape (seeds, multipliers).
        reference: the baseline's, shape (seeds,).
    """
    differences = losses - reference[:, None]
    means = differences.mean(axis=0)
    interval = seed_interval(differences, lambda means: means.max(axis=-1))
    bounds = (math.exp(interval[0]), math.exp(interval[1])) if interval else None
    return math.exp(float(means.max())), int(means.argmax()), bounds


def _over_the_axis(cells: _Cells, reference: Reference) -> dict[str, Any]:
    rows = [row for at in cells.values() for row in at]
    seeds = sorted(set.intersection(*({row.seed for row in at} for at in cells.values())) & set(reference.losses))
    losses = losses_by_seed(cells, seeds)
    baseline = np.array([reference.losses[seed] for seed in seeds])
    multipliers = sorted(cells)
    flat, flat_interval = sensitivity(losses)
    worst, at, worst_interval = worst_ratio(losses, baseline)
    best = int(losses.mean(axis=0).argmin())
    return {
        "runs": len(rows),
        "seeds": len(seeds),
        "multipliers": multipliers,
        "losses": [float(v) for v in losses.mean(axis=0)],
        "diverged": sum(row.diverged for row in rows),
        "divergence_rate": sum(row.diverged for row in rows) / len(rows),
        "lr_sensitivity": flat if len(multipliers) > 1 else None,
        "lr_sensitivity_interval": flat_interval if len(multipliers) > 1 else None,
        "worst_multiplier": multipliers[at],
        "worst_ratio": worst,
        "worst_ratio_interval": worst_interval,
        "best_multiplier": multipliers[best],
        "best_ppl": math.exp(min(float(losses.mean(axis=0)[best]), 700.0)),
        "best": judge([float(v) for v in losses[:, best] - baseline]),
        "interventions": sum(row.interventions for row in rows),
        "skips": sum(row.skips for row in rows),
        "rollbacks": sum(row.rollbacks for row in rows),
    }


def _at_base(
    rows: Sequence[Row], reference: Reference, folder: Path, records: Records, speed: float | None
) -> dict[str, Any]:
    """What holds at multiplier 1, where the rate is right and a run is healthy."""
    paired = [row for row in rows if row.seed in reference.losses]
    differences = np.array([[capped(row) - reference.losses[row.seed]] for row in paired])
    interval = seed_interval(differences, lambda means: means[..., 0])
    governed = [records.interventions(row) for row in rows if row.controller not in UNGOVERNED]
    counted = [found for found in governed if found is not None]
    decisions = sum(total for _, total in counted)
    return {
        "ppl": math.exp(min(fmean(capped(row) for row in rows), 700.0)),
        "ratio": math.exp(float(differences.mean())),
        "ratio_interval": [math.exp(v) for v in interval] if interval else None,
        **_to_target(paired, reference, records, speed),
        "run_seconds": median(row.steps * speed for row in rows) if speed else None,
        "tokens_per_second": median(_tokens_per_step(folder / row.folder) / speed for row in rows) if speed else None,
        "overhead": median(row.overhead_seconds / row.seconds for row in rows if row.seconds > 0),
        "beyond_modulation": sum(n for n, _ in counted),
        "beyond_modulation_share": sum(n for n, _ in counted) / decisions if decisions else None,
        "base_rollbacks": sum(row.rollbacks for row in rows),
        "base_skips": sum(row.skips for row in rows),
    }


def _to_target(
    rows: Sequence[Row], reference: Reference, records: Records, speed: float | None
) -> dict[str, float | None]:
    """Steps and seconds to the reference's loss, of the seeds at which the records of both tell."""
    steps, ratios = [], []
    for row in rows:
        taken = math.inf if row.diverged else records.steps_to(row, reference.losses[row.seed])
        if taken is not None and row.seed in reference.steps:
            steps.append(taken)
            ratios.append(_over(taken, reference.steps[row.seed]))
    found: dict[str, float | None] = {"reached": sum(map(math.isfinite, steps)), "timed": len(steps)}
    if steps:
        found |= {"steps_to_target": _finite(median(steps)), "steps_ratio": _finite(median(ratios))}
    if steps and speed and reference.step_seconds:
        found["seconds_ratio"] = _finite(median(ratios) * speed / reference.step_seconds)
    return found


def _over(value: float, reference: float) -> float:
    """A ratio that is infinite where the target was never reached."""
    return value / reference if reference > 0 else math.inf


def _tokens_per_step(folder: Path) -> int:
    recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    train = recipe["train"]
    return int(train["batch_size"]) * int(train["accumulation"]) * int(recipe["data"]["sequence_length"])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
