"""Exponentially forgetting statistics that a single NaN cannot kill."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class ExponentialMean:
    """Mean and mean absolute deviation with a stated half-life, seeded by the first value.

    A non-finite value is counted in `rejected` and never enters; before the first finite value `mean` is NaN.

    Args:
        half_life: observations after which a value's weight has halved.
    """

    def __init__(self, half_life: float) -> None:
        if not half_life > 0:
            raise ValueError(f"half_life: {half_life} must be > 0 observations")
        self.weight = 1.0 - 0.5 ** (1.0 / half_life)
        self.mean = math.nan
        self.deviation = 0.0
        self.count = 0
        self.rejected = 0

    def update(self, value: float) -> float:
        """Takes in one value and returns the mean."""
        if not math.isfinite(value):
            self.rejected += 1
            return self.mean
        if self.count == 0:
            self.mean = value
        else:
            # Bias-corrected weight: the first observations count equally, so a seed value is soon forgotten.
            weight = max(self.weight, 1.0 / (self.count + 1))
            self.deviation += weight * (abs(value - self.mean) - self.deviation)
            self.mean += weight * (value - self.mean)
        self.count += 1
        return self.mean

    def score(self, value: float, floor: float = 1e-12) -> float:
        """Distance of `value` from the mean in mean absolute deviations (at least `floor`); NaN before the mean exists."""
        return (value - self.mean) / max(self.deviation, floor)

    def state_dict(self) -> dict[str, Any]:
        """The statistics as JSON data."""
        mean = None if math.isnan(self.mean) else self.mean
        return {"mean": mean, "deviation": self.deviation, "count": self.count, "rejected": self.rejected}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self.mean = math.nan if state["mean"] is None else state["mean"]
        self.deviation, self.count, self.rejected = state["deviation"], state["count"], state["rejected"]
