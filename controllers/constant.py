"""The controller that leaves everything alone: the ungoverned run, observed."""

from __future__ import annotations

from lbw_rl.action import NEUTRAL, Action
from lbw_rl.controller import Context, Controller
from lbw_rl.signals import Telemetry


class Constant(Controller):
    """Always proposes the same scales; by default the neutral ones, which change no bit of the run.

    Args:
        lr_scale: multiple of the scheduled learning rate.
        momentum_scale: multiple of the momentum's averaging horizon.
    """

    name = "constant"

    def __init__(self, lr_scale: float = 1.0, momentum_scale: float = 1.0) -> None:
        self._action = (
            NEUTRAL if lr_scale == momentum_scale == 1.0 else Action(lr_scale=lr_scale, momentum_scale=momentum_scale)
        )

    def reset(self, context: Context) -> None:
        """Nothing to forget."""

    def act(self, telemetry: Telemetry) -> Action:
        """The same action, whatever the telemetry."""
        return self._action
