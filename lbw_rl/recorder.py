"""What governance did: counters, faults, and the ledger that may fail without harming the run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lbw_rl.action import Action, Directive
from lbw_rl.ledger import LEDGER_SCHEMA, Ledger
from lbw_rl.signals import Telemetry

log = logging.getLogger("lbw_rl")


class Recorder:
    """Counts decisions and faults and writes the ledger, if there is one.

    A ledger that cannot be opened or written to is a fault like any other: counted, logged once, and the run
    goes on without that line.

    Args:
        path: the ledger's file; None keeps counters alone.
        header: what a new ledger starts with.
    """

    def __init__(self, path: str | Path | None, header: Mapping[str, Any]) -> None:
        self.counts: Counter[str] = Counter()
        self.regimes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._ledger: Ledger | None = None
        if path is None:
            return
        try:
            self._ledger = Ledger(path)
            if Path(path).stat().st_size == 0:
                self._ledger.write("header", {"schema": LEDGER_SCHEMA, **header})
        except OSError as e:
            self.fault("ledger", e, 0)

    def fault(self, where: str, error: Exception, step: int) -> None:
        """Counts a fault of governance; the first of a kind is logged."""
        self.faults[where] += 1
        if self.faults[where] == 1:
            message = "governance fault in %s at step %d, the run goes on: %s: %s"
            log.warning(message, where, step, type(error).__name__, error)

    def count(self, action: Action) -> None:
        """Counts one decision by what is executed."""
        self.counts["decisions"] += 1
        self.regimes[action.regime] += 1
        if action.directive is Directive.SKIP:
            self.counts["skips"] += 1
        elif action.directive is Directive.ROLLBACK:
            self.counts["rollbacks"] += 1
        if action.directive is not Directive.PROCEED or action.lr_scale != 1.0 or action.momentum_scale != 1.0:
            self.counts["interventions"] += 1

    def write(
        self,
        step: int,
        telemetry: Telemetry,
        proposed: Any,
        executed: Action,
        reasons: tuple[str, ...],
        would: Action | None = None,
    ) -> None:
        """Writes one decision; `would` is what shadow mode holds back."""
        if self._ledger is None:
            return
        try:
            record = {
                "step": step,
                "telemetry": telemetry.as_dict(),
                "proposed": brief(proposed),
                "executed": brief(executed),
                "regime": (would or executed).regime,
                "evidence": dict((would or executed).evidence),
                "reasons": list(reasons),
            }
            if would is not None:
                record["would_execute"] = brief(would)
            self._ledger.write("decision", record)
        except Exception as e:  # a full disk, or evidence that is no JSON
            self.fault("ledger", e, step)

    def state_dict(self) -> dict[str, Any]:
        """The counters, as JSON data."""
        return {"counts": dict(self.counts), "regimes": dict(self.regimes), "faults": dict(self.faults)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self.counts, self.regimes, self.faults = (Counter(state[k]) for k in ("counts", "regimes", "faults"))

    def close(self, step: int) -> None:
        """Closes the ledger; counters stay readable."""
        if self._ledger is None:
            return
        try:
            self._ledger.close()
        except OSError as e:  # a line that the disk did not take is still in the buffer
            self.fault("ledger", e, step)
        self._ledger = None


def brief(action: Any) -> dict[str, Any] | None:
    """An action's scales and directive as JSON data; None for what is no `Action`."""
    if not isinstance(action, Action):
        return None
    return {
        "lr_scale": action.lr_scale,
        "momentum_scale": action.momentum_scale,
        "directive": str(action.directive),
    }


def unbrief(record: Mapping[str, Any]) -> Action:
    """Inverse of `brief`."""
    return Action(
        lr_scale=record["lr_scale"],
        momentum_scale=record["momentum_scale"],
        directive=Directive(record["directive"]),
    )
