"""Where every decision is told of: the counters, the ledger, the sinks."""

from __future__ import annotations

from typing import Any

from lbw_rl.action import Action, Directive
from lbw_rl.deliberation import Judgement
from lbw_rl.enforcer import Enforcer
from lbw_rl.recorder import Recorder, brief
from lbw_rl.sgd_rate import SgdRate
from lbw_rl.sinks.sink import Decision, GuardedSinks


class Account:
    """Gives account of decisions before their steps are executed.

    Args:
        recorder: counters and ledger.
        sinks: told of the same.
        enforcer: whose budgets the sinks are told.
        sgd_rate: Λ, which the ledger names where a step is handed over.
    """

    def __init__(self, recorder: Recorder, sinks: GuardedSinks, enforcer: Enforcer, sgd_rate: SgdRate) -> None:
        self._recorder, self._sinks = recorder, sinks
        self._enforcer, self._sgd_rate = enforcer, sgd_rate

    def enter(self, step: int, judgement: Judgement, *, last_good: int | None, overhead_seconds: float) -> None:
        """Counts, writes and tells one decision.

        Args:
            step: optimizer steps attempted before it.
            judgement: what came of it.
            last_good: the step that a rollback goes back to.
            overhead_seconds: wall time spent in governance, up to this decision.
        """
        telemetry, ruled = judgement.measured.telemetry, judgement.ruling.action
        if judgement.withheld:
            self._recorder.counts["skips"] += 1
        self._recorder.count(ruled)
        entries = self._further_entries(step, judgement, last_good)
        self._recorder.write(step, telemetry, judgement.proposed, judgement.executed, ruled, judgement.reasons, entries)
        if self._sinks:
            self._sinks.decided(self._decision(step, judgement, overhead_seconds))

    def _further_entries(self, step: int, judgement: Judgement, last_good: int | None) -> dict[str, Any]:
        """What the ledger says of some decisions only."""
        ruled = judgement.ruling.action
        entries: dict[str, Any] = {"would_execute": brief(ruled)} if judgement.shadow else {}
        if judgement.measured.nonfinite_ranks:
            entries["nonfinite_ranks"] = list(judgement.measured.nonfinite_ranks)
        if judgement.executed.directive is Directive.ROLLBACK:
            entries["restored_step"] = last_good
            entries["lost_steps"] = [last_good, step]  # their batches are spent, and not seen again
        if judgement.withheld:
            entries["withheld_on_device"] = True
        if ruled.hand_over:
            entries["sgd_rate"] = self._sgd_rate.value
        return entries

    def _decision(self, step: int, judgement: Judgement, overhead_seconds: float) -> Decision:
        spent = self._enforcer.authority.max_skips > 0 and not self._enforcer.may_skip()
        return Decision(
            step=step,
            telemetry=judgement.measured.telemetry,
            proposed=judgement.proposed if isinstance(judgement.proposed, Action) else None,
            ruled=judgement.ruling.action,
            executed=judgement.executed,
            reasons=judgement.reasons,
            suspended=self._enforcer.suspended,
            skip_budget_spent=spent,
            overhead_seconds=overhead_seconds,
            **self._recorder.totals(),
        )
