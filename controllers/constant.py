"""The controller that leaves everything alone: the ungoverned run, observed."""

from __future__ import annotations

import math

from lbw_rl.action import NEUTRAL, Action
from lbw_rl.controller import Context, Controller
from lbw_rl.signals import Telemetry


class Constant(Controller):
    """Always proposes the same scales; by default the neutral ones, which change no bit of the run.

    Args:
        lr_scale: multiple of the scheduled learning rate.
        momentum_scale: multiple of the momentum's averaging horizon.

    Raises:
        ValueError: a scale that is not a finite number > 0.
    """

    name = "constant"
    time_limit = None

    def __init__(self, lr_scale: float = 1.0, momentum_scale: float = 1.0) -> None:
        for name, value in (("lr_scale", lr_scale), ("momentum_scale", momentum_scale)):
            if not 0 < value < math.inf:
                raise ValueError(f"constant.{name}: {value} must be > 0 and finite")
        self._action = (
            NEUTRAL if lr_scale == momentum_scale == 1.0 else Action(lr_scale=lr_scale, momentum_scale=momentum_scale)
        )

    def reset(self, context: Context) -> None:
        """Nothing to forget."""

    def act(self, telemetry: Telemetry) -> Action:
        """The same action, whatever the telemetry."""
        return self._action
