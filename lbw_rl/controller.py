"""The one interface that rules, PID laws and learned policies share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lbw_rl.action import Action
from lbw_rl.authority import Authority
from lbw_rl.signals import Telemetry


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a controller is told about the run before its first decision.

    Attributes:
        total_steps: optimizer steps planned, `None` if unknown.
        decide_every: optimizer steps per decision.
        authority: the bounds its actions will be held to.
        seed: for controllers that draw random numbers.
        groups: names of the optimizer's parameter groups, in the order of `Action.group_lr_scales`.
        weights: elements of all trainable matrices, `None` if unknown.
        low_rank: whether most of those are in the factors of low-rank adapters.
        momentum: β1 or momentum that the optimizer was set to, 0 if it has none, `None` if that is not known.
        normalised: whether the optimizer sizes its updates itself, as Adam does; false where they are as uneven over the
            weights as the gradient is, as those of SGD.
    """

    total_steps: int | None = None
    decide_every: int = 1
    authority: Authority = field(default_factory=Authority)
    seed: int = 0
    groups: tuple[str, ...] = ()
    weights: int | None = None
    low_rank: bool = False
    momentum: float | None = None
    normalised: bool = True


class Controller(ABC):
    """Maps telemetry to a proposed action. Deterministic given its state and the telemetry.

    `act` is called once per decision with the signals of the window that just ended; what it returns is
    clipped by the authority and executed at the step at hand. Its state is plain JSON data, so that a
    checkpoint holds it and a ledger can replay it.
    """

    name: str = "controller"
    decide_every: int | None = None
    """Optimizer steps per decision that the controller was built for; `None` leaves it to the governor."""
    group_entropy: str | None = None
    """Name of the entropy estimator that telemetry is to carry for each parameter group; `None` for none."""
    time_limit: float | None = 5.0
    """Seconds that the run waits for `act` before it counts as a fault. `None`, for arithmetic that cannot hang, spares
    the hand-over to another thread."""

    @abstractmethod
    def reset(self, context: Context) -> None:
        """Starts a run: forgets all state and takes in its context."""

    @abstractmethod
    def act(self, telemetry: Telemetry) -> Action:
        """Proposes an action for the step at hand."""

    def state_dict(self) -> dict[str, Any]:
        """All that `act` depends on besides the telemetry, as JSON data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  (a stateless controller has nothing to load)
        """Restores what `state_dict` returned; the next `act` is as if nothing had happened between."""

    def rolled_back(self) -> None:  # noqa: B027  (most need do nothing)
        """Told after its own state and the run's have been put back to the last good ones: the trouble lies ahead."""

    def summary(self) -> dict[str, Any]:
        """Counters worth reporting at the end of a run (for example out-of-distribution decisions)."""
        return {}
