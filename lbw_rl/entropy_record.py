"""An entropy as a controller keeps it: smoothed over a few batches, remembered with a half-life, held against a target."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from lbw_rl.statistics import ExponentialMean

Target = float | Literal["auto"]


class EntropyRecord:
    """The entropy's moving average, its exponentially forgetting history, and the target taken from it.

    Args:
        target: H* in (0, 1]; "auto": the history's mean, first after `warmup` entries and again every `recalibrate`.
        smoothing: entries of the moving average.
        half_life: entries after which one weighs half as much in the history.
        warmup: healthy entries before the first automatic target.
        recalibrate: healthy entries between two automatic targets.
    """

    def __init__(self, target: Target, smoothing: int, half_life: float, warmup: int, recalibrate: int) -> None:
        self.target: float | None = None if target == "auto" else float(target)
        """H*; None before an automatic one is known."""
        self._auto = target == "auto"
        self._warmup, self._recalibrate = warmup, recalibrate
        self._recent: deque[float] = deque(maxlen=smoothing)
        self._history = ExponentialMean(half_life)

    def update(self, entropy: float, *, healthy: bool = True) -> bool:
        """Takes in one finite value; what is not healthy stays out of the history, and so out of the target.

        Returns:
            Whether an automatic target has been taken from the history just now.
        """
        self._recent.append(entropy)
        if not healthy:
            return False
        self._history.update(entropy)
        since = self._history.count - self._warmup
        if not self._auto or since < 0 or since % self._recalibrate:
            return False
        self.target = max(self._history.mean, 1e-3)
        return True

    @property
    def smoothed(self) -> float:
        """Mean of the last `smoothing` values; NaN before the first."""
        return sum(self._recent) / len(self._recent) if self._recent else math.nan

    @property
    def ratio(self) -> float:
        """`smoothed` / `target`; NaN while one of them is unknown."""
        return math.nan if self.target is None else self.smoothed / self.target

    def restart(self) -> None:
        """Empties the moving average: after a rollback its batches belong to another history."""
        self._recent.clear()

    def state_dict(self) -> dict[str, Any]:
        """The record as JSON data."""
        return {"recent": list(self._recent), "history": self._history.state_dict(), "target": self.target}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self._recent = deque(state["recent"], maxlen=self._recent.maxlen)
        self._history.load_state_dict(state["history"])
        if self._auto:  # a fixed one is the caller's
            self.target = state["target"]
