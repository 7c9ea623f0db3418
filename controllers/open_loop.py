"""Replays what a governor did to another run: the control that shows what the feedback was worth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lbw_rl.action import NEUTRAL, Action
from lbw_rl.controller import Context, Controller
from lbw_rl.ledger import read_ledger
from lbw_rl.signals import Telemetry


@dataclass(frozen=True, slots=True)
class _Recording:
    """One run's path.

    Attributes:
        progress: share of that run's steps before each decision, increasing, shape (decisions,).
        log_scale: logarithm of the executed learning-rate scale, shape (decisions,).
        steps: length of that run in optimizer steps; None for a list of scales.
    """

    progress: np.ndarray[Any, np.dtype[np.float64]]
    log_scale: np.ndarray[Any, np.dtype[np.float64]]
    steps: int | None

    def at(self, progress: float) -> float:
        """The log scale there, linear between decisions."""
        return float(np.interp(progress, self.progress, self.log_scale))


class OpenLoop(Controller):
    """The executed learning-rate scale of recorded runs, decision by decision; no telemetry is read.

    Where runs of other lengths or intervals were recorded, a scale is read off at the same share of the run, linear in the
    logarithm between decisions. Of several recordings the geometric mean is taken. A decision whose update was withheld
    executed no scale and is passed over. Where the horizon is unknown, the longest recording's is assumed and its end is held.
    Momentum, single groups' scales, skips and rollbacks are not replayed. Without a recording the run is left alone.

    Args:
        ledgers: files that governed runs wrote, or one of them.
        scales: a path given as numbers instead, one per decision of a whole run.
        constant: one scale for the whole run, the recordings' geometric mean.

    Raises:
        ValueError: both sources, a ledger that is missing, damaged or without an executed update, or a scale that is not
            a finite number > 0.
    """

    name = "open-loop"
    time_limit = None

    def __init__(
        self, ledgers: Sequence[str | Path] | str | Path = (), scales: Sequence[float] = (), constant: bool = False
    ) -> None:
        if isinstance(ledgers, str | Path):
            ledgers = [ledgers]
        if ledgers and scales:
            raise ValueError("open-loop.scales: given beside ledgers; accepted: one of the two")
        self._recordings = [_read(ledger) for ledger in ledgers]
        if scales:
            self._recordings = [_listed(scales)]
        self._mean = math.fsum(float(r.log_scale.mean()) for r in self._recordings) / max(1, len(self._recordings))
        self._constant = bool(constant)
        self.reset(Context())

    def reset(self, context: Context) -> None:
        """Goes back to the start of the path."""
        self._decisions = 0
        self._every = context.decide_every
        recorded = [r.steps if r.steps is not None else len(r.log_scale) * self._every for r in self._recordings]
        self._total = context.total_steps or max(recorded, default=1)

    def act(self, telemetry: Telemetry) -> Action:
        """The next scale of the path, whatever the telemetry."""
        progress = self._decisions * self._every / self._total
        self._decisions += 1
        if not self._recordings:
            return NEUTRAL
        log_scale = self._mean
        if not self._constant:
            log_scale = math.fsum(r.at(progress) for r in self._recordings) / len(self._recordings)
        return Action(lr_scale=math.exp(log_scale), regime="open-loop", evidence={"path_progress": progress})

    def state_dict(self) -> dict[str, Any]:
        """How far along the path the run is."""
        return {"decisions": self._decisions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self._decisions = state["decisions"]

    def summary(self) -> dict[str, Any]:
        """How many runs were recorded, and their geometric mean scale."""
        return {"recordings": len(self._recordings), "mean_lr_scale": math.exp(self._mean)}


def _listed(scales: Sequence[float]) -> _Recording:
    if isinstance(scales, str) or not all(_is_scale(s) for s in scales):
        raise ValueError(f"open-loop.scales: {scales!r} must be a list of finite numbers > 0")
    return _Recording(np.arange(len(scales)) / len(scales), np.log(np.array(scales, np.float64)), None)


def _read(ledger: str | Path) -> _Recording:
    total = None
    every = 1
    steps: list[int] = []
    scales: list[float] = []
    for record in _records(ledger):
        try:
            if record["type"] == "header":
                total, every = record["context"]["total_steps"], record["context"]["decide_every"]
            elif record["type"] == "decision":
                executed, step = record["executed"], int(record["step"])
                if executed["directive"] != "proceed" or record.get("withheld_on_device"):
                    continue
                if not _is_scale(executed["lr_scale"]):
                    raise ValueError("executed.lr_scale must be > 0 and finite")
                if steps and step <= steps[-1]:
                    raise ValueError(f"step {step} comes after step {steps[-1]}: it holds several runs")
                steps.append(step)
                scales.append(float(executed["lr_scale"]))
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"open-loop.ledgers: {ledger} is damaged ({type(e).__name__}: {e})") from e
    if not steps:
        raise ValueError(
            f"open-loop.ledgers: {ledger} holds no executed update; accepted: a governed run's ledger.jsonl"
        )
    length = max(total or 0, steps[-1] + every)
    return _Recording(np.array(steps) / length, np.log(np.array(scales)), length)


def _records(ledger: str | Path) -> Iterator[dict[str, Any]]:
    try:
        yield from read_ledger(ledger)
    except ValueError as e:
        raise ValueError(f"open-loop.ledgers: {str(e).removeprefix('ledger: ')}") from e


def _is_scale(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
