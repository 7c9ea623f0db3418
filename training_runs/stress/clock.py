"""When a run got to a loss, and how fast it stepped, read off its metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

from lbw_rl.training_runs.folders import read_jsonl

Curve = Sequence[tuple[float, float]]
"""(optimizer steps done, held-out loss in nats per token), in the order of the run."""


def held_out_curve(metrics: Path, initial_loss: float) -> list[tuple[float, float]]:
    """The held-out losses of a run's `metrics.jsonl`, the untrained model's at step 0 before them.

    A loss that was not finite has no point: the neighbours of it are joined.
    """
    points = [(0.0, initial_loss)]
    for record in read_jsonl(metrics):
        if "eval_loss" in record and record["eval_loss"] is not None:
            points.append((float(record["step"]) + 1, float(record["eval_loss"])))
    return points


def steps_to(curve: Curve, target: float) -> float:
    """Steps until the curve, linear between evaluations, first is at `target` or below it; inf if it never is."""
    for i, (step, loss) in enumerate(curve):
        if loss <= target:
            if i == 0:
                return step
            before, above = curve[i - 1]
            return before + (above - target) / (above - loss) * (step - before)
    return math.inf


def step_seconds(metrics: Path) -> float:
    """Median wall seconds of an optimizer step, governance included, evaluation and bookkeeping not; NaN of no step.

    The median and not the mean: what else a machine does at times then falls on no run.
    """
    clock = [0.0, *(float(record["seconds"]) for record in read_jsonl(metrics))]
    return median(b - a for a, b in pairwise(clock)) if len(clock) > 1 else math.nan
