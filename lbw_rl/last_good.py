"""When a state is good enough to go back to, and going back."""

from __future__ import annotations

from collections.abc import Callable

from lbw_rl.action import Action, Directive
from lbw_rl.authority import Authority
from lbw_rl.signals import Telemetry
from lbw_rl.snapshot import Snapshot
from lbw_rl.stages import Mode

HEALTHY_REGIMES = frozenset(
    {"steady", "calibrating", "annealing", "raising", "holding-back", "low-entropy", "high-entropy", "learned"}
)
"""Regimes in which a state may be kept as the last good one."""


class LastGood:
    """Keeps a snapshot of a healthy run where authority and mode permit rollbacks.

    Args:
        snapshot: the copy.
        authority: whether, and how often, one is kept.
        fault: told (source, error) of what goes wrong.
    """

    def __init__(self, snapshot: Snapshot, authority: Authority, fault: Callable[[str, Exception], None]) -> None:
        self.snapshot = snapshot
        self._authority = authority
        self._fault = fault
        self._fits = True

    @property
    def step(self) -> int | None:
        """The optimizer step before which the kept state was, None if there is none."""
        return self.snapshot.step

    def offer(self, step: int, telemetry: Telemetry, action: Action, mode: Mode) -> None:
        """Keeps the present state if one is due and this one is healthy."""
        allowed = mode == "govern" and self._authority.max_rollbacks and self._fits
        if not allowed or telemetry.nonfinite or action.directive is not Directive.PROCEED:
            return
        kept = self.snapshot.step
        due = kept is None or step - kept >= self._authority.snapshot_every
        if not due or action.regime not in HEALTHY_REGIMES:
            return
        try:
            kept_now = self.snapshot.take(step)
        except Exception as e:  # a state that cannot be copied
            self._fault("snapshot", e)
            self._give_up()
            return
        if not kept_now:
            needed, allowance = self.snapshot.bytes_needed(), self.snapshot.byte_budget
            self._fault("snapshot", MemoryError(f"{needed:,} bytes needed, {allowance:,} allowed"))
            self._give_up()

    def _give_up(self) -> None:
        self._fits = False
        self.snapshot.drop()

    def restore(self) -> None:
        """Goes back; a state that cannot be put back is a fault, and the step at hand is withheld all the same."""
        try:
            self.snapshot.restore()
        except Exception as e:
            self._fault("snapshot", e)
