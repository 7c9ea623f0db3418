"""Where the update-to-weight ratio of a healthy run lies, and the plant that leads there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lbw_rl.signals import Telemetry
from lbw_rl.statistics import ExponentialMean

DISPLACEMENT = 0.5
"""Update ratio × sqrt(total steps) at the start of a well-tuned run: its random-walk displacement relative to its
weights. Chosen on `mini-qwen2` at 300 steps (docs/LOG.md, 2026-11-22)."""
UNKNOWN_HORIZON = 1000
"""Steps assumed where the caller does not know how long the run will be."""


def ratio_level(total_steps: int | None, displacement: float = DISPLACEMENT) -> float:
    """The update-to-weight ratio to start from: displacement / sqrt(total steps)."""
    return displacement / math.sqrt(total_steps or UNKNOWN_HORIZON)


def falling(progress: float) -> float:
    """The set-point's shape over a run: sqrt(1 − progress), constant where the horizon is unknown (NaN)."""
    return math.sqrt(max(0.0, 1.0 - progress)) if math.isfinite(progress) else 1.0


class RatioPlant:
    """Identifies how many units of update-to-weight ratio one unit of executed learning rate buys.

    The plant is `ratio = gain · learning rate`: exact for SGD without momentum, and slowly varying for Adam,
    whose step size is nearly that of the rate. The gain is a geometric mean over the last few updates.

    Args:
        half_life: updates after which an observed gain's weight has halved.
    """

    def __init__(self, half_life: float) -> None:
        self._log_gain = ExponentialMean(half_life)
        self._executed_lr: float | None = None
        self._rise = 0.0  # of the scheduled rate within the last decision's steps; new at every observation

    def observe(self, t: Telemetry) -> None:
        """Takes in the ratio of the last update, executed at the scheduled rate of its step × the executed scale.

        Where that rate was not recorded (on an accelerator's own memory, or in an older ledger), the one of the last decision stands for it.
        """
        executed = t.previous_learning_rate if t.previous_learning_rate > 0 else self._executed_lr
        self._rise = max(0.0, executed - self._executed_lr) if executed and self._executed_lr else 0.0
        if executed and t.update_ratio > 0:
            self._log_gain.update(math.log(t.update_ratio / (executed * t.lr_scale)))
        self._executed_lr = t.learning_rate if math.isfinite(t.learning_rate) else None

    def scale_for(self, ratio: float, learning_rate: float) -> float | None:
        """The learning-rate scale that makes the next update `ratio`; None before the gain is known or where the schedule is at 0.

        Where a decision holds for several steps of a warmup, it is the last of them that is to reach `ratio`: the schedule is
        taken to rise by as much as it did between the last decision and the next.
        """
        if self._log_gain.count == 0 or not learning_rate > 0:
            return None
        return ratio / (math.exp(self._log_gain.mean) * (learning_rate + self._rise))

    def state_dict(self) -> dict[str, Any]:
        """The identified gain."""
        return {"log_gain": self._log_gain.state_dict(), "executed_lr": self._executed_lr}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self._log_gain.load_state_dict(state["log_gain"])
        self._executed_lr = state["executed_lr"]
