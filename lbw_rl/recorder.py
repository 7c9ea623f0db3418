"""What governance did: counters, faults, and the ledger that may fail without harming the run."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lbw_rl.action import Action, Directive
from lbw_rl.controller import Context
from lbw_rl.ledger import LEDGER_SCHEMA, Ledger, latest_header, truncate_jsonl
from lbw_rl.signals import SIGNALS, Telemetry
from lbw_rl.stages import Mode

log = logging.getLogger("lbw_rl")

_REPEATABLE = tuple(name for name, s in SIGNALS.items() if s.source not in ("clock", "device"))


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
        self.digest = "0" * 12
        """12 hex digits over all decisions so far, clock and device signals left out."""
        self._ledger: Ledger | None = None
        self._header = {"schema": LEDGER_SCHEMA, **header}
        self._begun_before = False
        if path is None:
            return
        try:
            self._ledger = Ledger(path)
            self._begun_before = _same_run(latest_header(path), header)
            if not self._begun_before:
                self._ledger.write("header", self._header)
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
        self.counts["hand_overs"] += action.hand_over
        scaled = any(scale != 1.0 for scale in (action.lr_scale, action.momentum_scale, *action.group_lr_scales))
        if action.directive is not Directive.PROCEED or scaled or action.hand_over:
            self.counts["interventions"] += 1

    def write(
        self,
        step: int,
        telemetry: Telemetry,
        proposed: Any,
        executed: Action,
        ruled: Action,
        reasons: tuple[str, ...],
        extra: Mapping[str, Any],
    ) -> None:
        """Writes one decision.

        Args:
            step, telemetry, proposed, executed: what was seen, asked for and done.
            ruled: what the authority allowed; in shadow mode it is not what is executed.
            reasons: why executed differs from proposed.
            extra: further entries of the line.
        """
        self._extend_digest(step, telemetry, executed, ruled)
        if self._ledger is None:
            return
        if self._begun_before and step == 0:  # the same script once more: a run of its own
            self._line("header", self._header, step)
        self._begun_before = False
        record = {
            "step": step,
            "telemetry": telemetry.as_record(),
            "proposed": brief(proposed),
            "executed": brief(executed),
            "regime": ruled.regime,
            "evidence": dict(ruled.evidence),
            "reasons": list(reasons),
            **extra,
            "digest": self.digest,
        }
        self._line("decision", record, step)

    def event(self, kind: str, step: int, record: Mapping[str, Any]) -> None:
        """Writes what happens between decisions or beside them: a change of mode, a poisoned step."""
        self._line(kind, {"step": step, **record}, step)

    def _line(self, kind: str, record: Mapping[str, Any], step: int) -> None:
        if self._ledger is None:
            return
        try:
            self._ledger.write(kind, record)
        except Exception as e:  # a full disk, or evidence that is no JSON
            self.fault("ledger", e, step)

    def _extend_digest(self, step: int, telemetry: Telemetry, executed: Action, ruled: Action) -> None:
        """Folds one decision into the digest: two runs, or two ranks, with the same one have decided alike."""
        values = telemetry.as_dict()
        seen = [values[name] for name in _REPEATABLE] + list(telemetry.group_grad_entropy)
        done = (executed.lr_scale, executed.momentum_scale, *executed.group_lr_scales, float(step))
        packed = struct.pack(f"<{len(seen) + len(done)}d", *seen, *done)
        words = f"{self.digest} {executed.directive} {executed.hand_over} {ruled.regime}".encode(
            "utf-8", "surrogatepass"
        )  # a regime's name is the controller's
        self.digest = hashlib.blake2b(packed + words, digest_size=6).hexdigest()

    def flush(self, step: int) -> None:
        """Brings the ledger to the disk."""
        if self._ledger is None:
            return
        try:
            self._ledger.flush()
        except OSError as e:
            self.fault("ledger", e, step)

    def totals(self) -> dict[str, dict[str, int]]:
        """A copy of the counters: `counts`, `regimes` and `faults`."""
        return {"counts": dict(self.counts), "regimes": dict(self.regimes), "faults": dict(self.faults)}

    def state_dict(self) -> dict[str, Any]:
        """The counters, as JSON data."""
        return {**self.totals(), "digest": self.digest}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Restores `state_dict`; the ledger loses the steps from `step` on, which are taken again."""
        self.counts, self.regimes, self.faults = (Counter(state[k]) for k in ("counts", "regimes", "faults"))
        self.digest = state["digest"]
        self._begun_before = False
        if self._ledger is None:
            return
        path = self._ledger.path
        try:
            self._ledger.close()
            truncate_jsonl(path, step)
            self._ledger = Ledger(path)
        except OSError as e:
            self.fault("ledger", e, step)

    def close(self, step: int) -> None:
        """Closes the ledger; counters stay readable."""
        if self._ledger is None:
            return
        try:
            self._ledger.close()
        except OSError as e:  # some network disks say only now that they have failed
            self.fault("ledger", e, step)
        self._ledger = None


def run_header(controller: str, mode: Mode, context: Context) -> dict[str, Any]:
    """What a replay has to know about the run, and the ranks have to agree on, as JSON data."""
    told = {
        "total_steps": context.total_steps,
        "decide_every": context.decide_every,
        "authority": context.authority.model_dump(),
        "seed": context.seed,
        "groups": list(context.groups),
        "weights": context.weights,
        "low_rank": context.low_rank,
        "momentum": context.momentum,
        "normalised": context.normalised,
    }
    return {"controller": controller, "mode": mode, "context": told}


def _same_run(written: Mapping[str, Any] | None, header: Mapping[str, Any]) -> bool:
    """Whether a ledger's newest header is of this controller in this context; the mode may have changed since."""
    plain = json.loads(json.dumps(header))
    return written is not None and all(written.get(key) == plain[key] for key in ("controller", "context"))


def brief(action: Any) -> dict[str, Any] | None:
    """An action's scales, directive and hand-over as JSON data; None for what is no `Action`."""
    if not isinstance(action, Action):
        return None
    groups = {"group_lr_scales": list(action.group_lr_scales)} if action.group_lr_scales else {}
    return {
        "lr_scale": action.lr_scale,
        **groups,
        "momentum_scale": action.momentum_scale,
        "directive": str(action.directive),
        **({"hand_over": True} if action.hand_over else {}),
    }


def unbrief(record: Mapping[str, Any]) -> Action:
    """Inverse of `brief`."""
    return Action(
        lr_scale=record["lr_scale"],
        group_lr_scales=tuple(record.get("group_lr_scales", ())),
        momentum_scale=record["momentum_scale"],
        directive=Directive(record["directive"]),
        hand_over=record.get("hand_over", False),
    )
