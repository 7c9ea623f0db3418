"""One decision: the controller is asked, and the authority rules on its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lbw_rl.action import NEUTRAL, Action, Directive
from lbw_rl.controller import Controller
from lbw_rl.enforcer import Enforcer, Ruling
from lbw_rl.hand_over import impossible
from lbw_rl.measurement import Measured
from lbw_rl.sgd_rate import SgdRate, largest_beta1
from lbw_rl.signals import Telemetry
from lbw_rl.time_limit import TimeLimit


@dataclass(frozen=True, slots=True)
class Judgement:
    """What came of one decision.

    Attributes:
        measured: what was seen.
        proposed: the controller's answer, unclipped, whatever it is; None if it raised or was not asked.
        ruling: what the authority made of it.
        executed: what the step executes: in shadow mode the neutral action, else that of the ruling.
        shadow: whether it was ruled for the record alone.
        withheld: whether the device has withheld the update that this telemetry, one decision late, speaks of.
    """

    measured: Measured
    proposed: Any
    ruling: Ruling
    executed: Action
    shadow: bool
    withheld: bool

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why `executed` differs from `proposed`."""
        return (*self.ruling.reasons, "shadow mode") if self.shadow else self.ruling.reasons


class Deliberation:
    """Brings what is measured to a controller, within its time limit, and its answer before the authority.

    What the controller raises ends here: it is a fault, which the authority answers with the neutral action.

    Args:
        optimizer: that is governed; read only.
        controller: who is asked, until it is suspended.
        enforcer: the authority in force.
        sgd_rate: Λ, without which no step is handed over to SGD; kept up to date here.
        fault: told (source, error).
        decide_every: optimizer steps per decision.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        controller: Controller,
        enforcer: Enforcer,
        sgd_rate: SgdRate,
        fault: Callable[[str, Exception], None],
        decide_every: int = 1,
    ) -> None:
        self._decide_every = decide_every
        self._optimizer, self._controller = optimizer, controller
        self._enforcer, self._sgd_rate = enforcer, sgd_rate
        self._fault = fault
        limit = controller.time_limit
        self._time_limit = TimeLimit(limit) if limit is not None else None

    def judge(self, measured: Measured, *, restorable: bool, armed: bool) -> Judgement:
        """Decides.

        Args:
            measured: telemetry and what came with it.
            restorable: whether there is a last good state to roll back to.
            armed: whether the device was told to withhold the step that late telemetry speaks of, were it poisoned.
        """
        telemetry = measured.telemetry
        self._sgd_rate.update(telemetry, largest_beta1(self._optimizer))
        proposed, fault = (None, None) if self._enforcer.suspended else self._ask(telemetry)
        ruling = self._enforcer.rule(
            proposed,
            fault,
            restorable=restorable,
            groups=len(self._optimizer.param_groups),
            late=measured.late,
            no_hand_over=self._no_hand_over(proposed),
        )
        shadow = self._enforcer.mode == "shadow"
        executed = NEUTRAL if shadow else ruling.action
        withheld = measured.late and telemetry.nonfinite == 1 and armed
        if withheld:
            self._enforcer.note_skip()
        if withheld or executed.directive is not Directive.PROCEED:
            self._sgd_rate.withheld()
        return Judgement(measured, proposed, ruling, executed, shadow, withheld)

    def _ask(self, telemetry: Telemetry) -> tuple[Any, str | None]:
        """The controller's answer, or the text of what it raised: a broken one loses its say, not the run."""
        act = self._controller.act
        try:
            return (act(telemetry) if self._time_limit is None else self._time_limit(act, telemetry)), None
        except Exception as e:
            self._fault("controller", e)
            return None, f"{type(e).__name__}: {e}"

    def _no_hand_over(self, proposed: Any) -> str | None:
        if not isinstance(proposed, Action) or not proposed.hand_over:
            return None  # nobody asks
        if self._decide_every > 1:  # Λ cannot be measured, nor a burst be seen between two decisions
            return f"decide_every is {self._decide_every}; a hand-over needs 1"
        return impossible(self._optimizer) or self._sgd_rate.unknown

    def rolled_back(self) -> None:
        """Tells the controller that weights, moments and its own state are those of the last good step."""
        try:
            self._controller.rolled_back()
        except Exception as e:
            self._fault("controller", e)

    def summary(self) -> dict[str, Any]:
        """The controller's own counters; none if it cannot tell."""
        try:
            return self._controller.summary()
        except Exception as e:
            self._fault("controller", e)
            return {}

    def close(self) -> None:
        """Lets the thread that the controller answers on end."""
        if self._time_limit is not None:
            self._time_limit.close()
