"""Reads a run's `metrics.jsonl` and `ledger.jsonl` for plotting: tolerant of what a killed run leaves."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of a line: optimizer steps and values, both shape (n,); NaN breaks the line."""

    steps: Array
    values: Array

    def finite(self) -> Array:
        """The values that can be drawn, shape (≤ n,)."""
        return self.values[np.isfinite(self.values)]


@dataclass(frozen=True, slots=True)
class Metrics:
    """Training and held-out loss of one run, nats per token."""

    train: Curve
    held_out: Curve


@dataclass(frozen=True, slots=True)
class Band:
    """Decisions in a row under one regime: steps [start, end), and what the first of them said of it."""

    start: float
    end: float
    regime: str
    detail: str


@dataclass(frozen=True, slots=True)
class Decisions:
    """What one run's ledger tells: executed LR scale, directives other than proceed, regimes.

    Attributes:
        lr_scale: executed multiple of the scheduled learning rate.
        directives: (step, `skip` or `rollback`, executed LR scale) of every decision that was not `proceed`.
        bands: the regimes, in order and without gaps.
        gpu_utilization: median over the run, share of 1; NaN where none was measured.
    """

    lr_scale: Curve
    directives: list[tuple[float, str, float]]
    bands: list[Band]
    gpu_utilization: float


@dataclass
class RecipeRuns:
    """What the figures of one recipe are drawn from: the median seed of each arm and multiplier.

    Attributes:
        metrics: multiplier → arm → curves.
        decisions: multiplier → arm → decisions; only governed arms have any.
        without_metrics: arms (with multiplier) whose metrics are missing.
        without_ledger: the same of ledgers, governed arms only.
    """

    metrics: dict[float, dict[str, Metrics]] = field(default_factory=dict)
    decisions: dict[float, dict[str, Decisions]] = field(default_factory=dict)
    without_metrics: list[str] = field(default_factory=list)
    without_ledger: list[str] = field(default_factory=list)

    def regimes(self) -> list[str]:
        """The regimes of all these runs, in order of appearance."""
        bands = (band for at in self.decisions.values() for run in at.values() for band in run.bands)
        return list(dict.fromkeys(band.regime for band in bands))


def read_metrics(path: Path, max_points: int) -> Metrics | None:
    """The curves of a `metrics.jsonl`; `None` if it is missing or holds no step."""
    steps, train, held_out = [], [], []
    for record in _records(path):
        if math.isfinite(step := _number(record.get("step"))):
            steps.append(step)
            train.append(_number(record.get("loss")))
            held_out.append(_number(record.get("eval_loss")))
    if not steps:
        return None
    order = np.argsort(np.asarray(steps), kind="stable")
    at, loss, evals = (np.asarray(v)[order] for v in (steps, train, held_out))
    measured = ~np.isnan(evals)
    return Metrics(
        downsample(Curve(at, smooth(loss)), max_points),
        downsample(Curve(at[measured], evals[measured]), max_points),
    )


def read_decisions(path: Path, max_points: int, max_bands: int) -> Decisions | None:
    """The decisions of a `ledger.jsonl`; `None` if it is missing or holds none."""
    steps: list[float] = []
    scales: list[float] = []
    regimes: list[str] = []
    utilization: list[float] = []
    directives: list[tuple[float, str, float]] = []
    details: dict[int, str] = {}
    for record in _records(path):
        step = _number(record.get("step"))
        if record.get("type") != "decision" or not math.isfinite(step):
            continue
        executed = _mapping(record.get("executed"))
        scale = _number(executed.get("lr_scale"))
        regime = str(record.get("regime") or "unnamed")
        if not regimes or regimes[-1] != regime:
            details[len(steps)] = _detail(record)
        directive = str(executed.get("directive") or "proceed")
        if directive != "proceed":
            directives.append((step, directive, scale))
        steps.append(step)
        scales.append(scale if scale > 0 else math.nan)
        regimes.append(regime)
        utilization.append(_number(_mapping(record.get("telemetry")).get("gpu_utilization")))
    if not steps:
        return None
    at, used = np.asarray(steps), np.asarray(utilization)
    return Decisions(
        downsample(Curve(at, np.asarray(scales)), max_points),
        thin(directives, max_points // 2),
        _bands(at, regimes, details, max_bands),
        float(np.nanmedian(used)) if np.isfinite(used).any() else math.nan,
    )


def smooth(values: Array) -> Array:
    """Centred running mean over 2 % of the run (shape (n,) → (n,)); NaN stays NaN and enters no mean."""
    half = len(values) // 100
    if half == 0:
        return values
    finite = np.isfinite(values)
    kernel = np.ones(2 * half + 1)
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    count = np.convolve(finite.astype(float), kernel, mode="same")
    return np.where(finite, total / np.maximum(count, 1.0), np.nan)


def downsample(curve: Curve, max_points: int) -> Curve:
    """At most `max_points` of a curve's points: the lowest and the highest of each bucket, so spikes stay."""
    n = len(curve.steps)
    if n <= max_points:
        return curve
    kept: list[int] = []
    for bucket in np.array_split(np.arange(n), max(1, max_points // 2)):
        values = curve.values[bucket]
        if np.isnan(values).all():
            kept.append(int(bucket[0]))
            continue
        kept += sorted({int(bucket[np.nanargmin(values)]), int(bucket[np.nanargmax(values)])})
    return Curve(curve.steps[kept], curve.values[kept])


def thin(items: list[tuple[float, str, float]], most: int) -> list[tuple[float, str, float]]:
    """Evenly spaced `most` of the items, or all of them if there are no more."""
    if len(items) <= most:
        return items
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, max(1, most))]


def _bands(steps: Array, regimes: list[str], details: dict[int, str], most: int) -> list[Band]:
    """Runs of equal regimes; if there are more than `most`, the rarest regime of each of `most` slices.

    The rarest, not the commonest: a spike of one decision is what the strip is there to show.
    """
    starts = sorted(details)
    chosen = [(i, regimes[i], details[i]) for i in starts]
    if len(chosen) > most:
        frequency = Counter(regimes)
        chosen = []
        for part in np.array_split(np.arange(len(regimes)), most):
            regime = min((regimes[i] for i in part), key=lambda name: frequency[name])
            first = next(int(i) for i in part if regimes[i] == regime)
            if not chosen or chosen[-1][1] != regime:
                origin = starts[int(np.searchsorted(starts, first, side="right")) - 1]
                chosen.append((int(part[0]), regime, details[origin]))
    gap = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    edges = [*(float(steps[i]) for i, _, _ in chosen[1:]), float(steps[-1]) + max(gap, 1.0)]
    begins = [float(steps[i]) for i, _, _ in chosen]
    return [Band(a, b, c[1], c[2]) for a, b, c in zip(begins, edges, chosen, strict=True) if b > a]


def _detail(record: Mapping[str, Any]) -> str:
    """Hover text of a decision, as escaped markup: evidence, executed scales, reasons."""
    evidence = _mapping(record.get("evidence"))
    executed = _mapping(record.get("executed"))
    lines = [f"{escape(str(k))[:32]} = {_short(v)}" for k, v in list(evidence.items())[:4]]
    scales = [f"{name} ×{_short(executed[key])}" for name, key in _SCALES if executed.get(key) is not None]
    reasons = record.get("reasons")
    lines += [", ".join(scales)] if scales else []
    lines += [escape(str(reason))[:60] for reason in (reasons if isinstance(reasons, list) else [])[:2]]
    return "<br>".join(lines)


_SCALES = [("LR", "lr_scale"), ("momentum", "momentum_scale")]


def _short(value: Any) -> str:
    number = _number(value)
    return f"{number:.3g}" if math.isfinite(number) else escape(str(value))[:32] if value is not None else "–"


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """JSON objects of a file; lines that are none (torn by a kill) and a file that is missing yield nothing."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
