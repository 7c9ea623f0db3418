"""What a controller may ask for, and the one bijection between actions and `[-1, 1]`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Directive(StrEnum):
    """What to do with the step at hand."""

    PROCEED = "proceed"
    SKIP = "skip"
    ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """A controller's proposal, or what the authority left of it.

    Attributes:
        lr_scale: multiple of the *scheduled* learning rate; 1 leaves it alone. Never compounds.
        group_lr_scales: further multiples, one per parameter group in the optimizer's order; empty leaves the groups'
            rates in the proportions that they have.
        momentum_scale: multiple of the momentum's averaging horizon 1/(1−β); 1 leaves it alone.
        directive: proceed, skip this update, or roll back to the last good snapshot.
        hand_over: run this step as SGD with momentum instead of the optimizer's own rule, at the rate that governance
            has measured for it; asked for at every decision anew.
        regime: the controller's name for the state that it sees.
        evidence: name → value of what made it say so.
    """

    lr_scale: float = 1.0
    group_lr_scales: tuple[float, ...] = ()
    momentum_scale: float = 1.0
    directive: Directive = Directive.PROCEED
    hand_over: bool = False
    regime: str = "steady"
    evidence: Mapping[str, float] = field(default_factory=dict)


NEUTRAL = Action()
"""Leave the optimizer alone."""


def log_interpolate(unit: float, bounds: tuple[float, float]) -> float:
    """Maps `unit` ∈ [-1, 1] log-linearly onto `bounds`: -1 → low, +1 → high, 0 → their geometric mean.

    Clips `unit` first, so the result never leaves the bounds. Bounds symmetric about 1 in the log
    (for example 1/100…100) make 0 the neutral action. NaN stays NaN: a fault for the authority to see, not a bound.
    """
    low, high = bounds
    fraction = (min(max(unit, -1.0), 1.0) + 1.0) / 2.0  # in this order NaN passes through
    value = math.exp(math.log(low) + fraction * (math.log(high) - math.log(low)))
    if abs(value - 1.0) < 1e-12:
        return 1.0  # exp∘log misses 1 by a few ulps, and only an exact 1 leaves every bit of a run alone
    return min(max(value, low), high)  # and an end point by one ulp


def log_position(value: float, bounds: tuple[float, float]) -> float:
    """Inverse of `log_interpolate`, clipped to [-1, 1]; a bound of zero width reads as 0."""
    low, high = (math.log(b) for b in bounds)
    if high == low:
        return 0.0
    return min(1.0, max(-1.0, 2.0 * (math.log(value) - low) / (high - low) - 1.0))
