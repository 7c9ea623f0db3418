"""The contract of a sink, and the guard that keeps a sink's faults away from the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lbw_rl.action import Action
from lbw_rl.signals import Telemetry

if TYPE_CHECKING:
    from lbw_rl.governor import Governor


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One decision as every sink is told of it. Never changed afterwards, so that any thread may read it.

    Attributes:
        step: optimizer steps attempted before it.
        telemetry: what was seen.
        proposed: what the controller asked for, unclipped; None if it raised, was suspended or gave no `Action`.
        ruled: what the authority made of that, with regime and evidence; in shadow mode it is not executed.
        executed: what the step executes.
        reasons: why `executed` differs from `proposed`.
        suspended: whether the controller has lost its authority for good.
        skip_budget_spent: whether the authority would deny a skip for want of budget.
        counts: totals of `decisions`, `interventions`, `skips` and `rollbacks`; one that never happened may be absent.
        regimes: regime → decisions so far.
        faults: source → faults of governance so far.
        overhead_seconds: wall time spent in governance, up to this decision.
    """

    step: int
    telemetry: Telemetry
    proposed: Action | None
    ruled: Action
    executed: Action
    reasons: tuple[str, ...]
    suspended: bool
    skip_budget_spent: bool
    counts: Mapping[str, int]
    regimes: Mapping[str, int]
    faults: Mapping[str, int]
    overhead_seconds: float


class Sink:
    """A backend that is told of every decision. The hooks run on the training thread: they must not wait.

    An exception of a hook is a fault of governance under the sink's `name`: counted, logged once, and the run goes on.
    After `close` a sink may be opened again, by the next training with the same callback for instance.
    """

    name = "sink"

    def open(self, governor: Governor) -> None:
        """Called when the governor has attached. A sink that raises here is called no more."""

    def decided(self, decision: Decision) -> None:
        """Called once per decision, before its step is executed."""

    def close(self) -> None:
        """Called when the governor is closed; not when governance is let go while the run goes on."""


class GuardedSinks:
    """The sinks of one governor, whose exceptions end here.

    Args:
        fault: told (sink's name, error).
    """

    def __init__(self, fault: Callable[[str, Exception], None]) -> None:
        self._fault = fault
        self._open: list[Sink] = []

    def __bool__(self) -> bool:
        """Whether anybody listens."""
        return bool(self._open)

    def open(self, sinks: Sequence[Sink], governor: Governor) -> None:
        """Opens them in order; one that fails is left out from then on."""
        for sink in sinks:
            try:
                sink.open(governor)
            except Exception as e:
                self._fault(sink.name, e)
            else:
                self._open.append(sink)

    def decided(self, decision: Decision) -> None:
        """Tells all of a decision."""
        for sink in self._open:
            try:
                sink.decided(decision)
            except Exception as e:
                self._fault(sink.name, e)

    def close(self) -> None:
        """Closes all that were opened. Safe to call twice."""
        closing, self._open = self._open, []
        for sink in closing:
            try:
                sink.close()
            except Exception as e:
                self._fault(sink.name, e)
