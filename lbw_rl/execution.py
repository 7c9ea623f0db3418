"""What governance writes for the length of one step, and that nothing of it is left behind."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lbw_rl.action import NEUTRAL, Action, Directive
from lbw_rl.actuator import Actuator
from lbw_rl.device_guard import DeviceGuard
from lbw_rl.sgd_rate import SgdRate


class Execution:
    """Executes actions on an optimizer, each for one step.

    Args:
        optimizer: that is governed.
        sgd_rate: Λ, for steps that are handed over to SGD.
        fault: told (source, error) of what cannot be written or put back.

    Attributes:
        executed: the action of the latest step.
        held: what every step of the present window executes, unless it alone is withheld.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, sgd_rate: SgdRate, fault: Callable[[str, Exception], None]
    ) -> None:
        self._optimizer, self._sgd_rate, self._fault = optimizer, sgd_rate, fault
        self._actuator, self._guard = Actuator(optimizer, fault), DeviceGuard(optimizer)
        self.executed = self.held = NEUTRAL

    def open_window(self, decided: Action) -> None:
        """Holds a decision's scales until the next one; a skip is for its own step only."""
        self.held = Action(
            lr_scale=decided.lr_scale,
            group_lr_scales=decided.group_lr_scales,
            momentum_scale=decided.momentum_scale,
            hand_over=decided.hand_over,
        )

    def before_closure(self) -> None:
        """LBFGS reads its rate before its closure brings the gradients that a decision needs: it gets the last one's."""
        if not isinstance(self._optimizer, torch.optim.LBFGS):
            return
        try:
            self._actuator.apply(self.held)
        except Exception as e:
            self._fault("actuator", e)
            self.put_back()

    def arm(self, bad: torch.Tensor, action: Action) -> None:
        """Has the device withhold the coming step, which is to execute `action`, where `bad` turns out to be true."""
        self._guard.arm(bad, by_gradients=action.hand_over)

    def execute(self, action: Action) -> None:
        """Writes an action for the coming step.

        Raises:
            Exception: the optimizer cannot be written to.
        """
        self._actuator.apply(action, self._sgd_rate.value)
        self.executed = action

    def again(self) -> None:
        """A line search has brought new gradients: a withheld step withholds them too."""
        try:
            if self.executed.directive is not Directive.PROCEED or self.executed.hand_over:  # which has moved already
                self._actuator.apply(Action(directive=Directive.SKIP))
        except Exception as e:
            self._fault("actuator", e)

    def put_back(self) -> None:
        """Leaves nothing of a step's action behind, after the step or once one that raised is gone."""
        try:
            self._guard.disarm()
            self._actuator.restore()
        except Exception as e:
            self._fault("actuator", e)

    def let_go(self, action: Action) -> None:
        """Executes, in this step and the rest of the window, what letting go permits; where even that fails, nothing."""
        self.executed = self.held = action
        try:
            self._actuator.apply(action)
        except Exception as e:  # the optimizer cannot be written to at all
            self._fault("actuator", e)
            self.put_back()
            self.executed = NEUTRAL

    def rest(self) -> None:
        """Executes nothing from here on, until it is told to."""
        self.executed = self.held = NEUTRAL
