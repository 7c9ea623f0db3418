"""Actions relative to a rule: what a policy multiplies, and what it is told of its last multiple."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lbw_rl.action import Action, Directive, log_interpolate

REACH = (2.0**0.5, 1.25)
"""Largest multiples, and 1 / smallest, of a rule's learning-rate scale and of its momentum scale. Twice a right update-to-weight ratio
loses a run on real text 0.2 to 1.5 nats, √2 of it 0 to 0.2 (docs/LOG.md, 2026-11-28)."""


def steered(proposal: Action, unit: Sequence[float], reach: Sequence[float] = REACH) -> Action:
    """A rule's action, its scales multiplied by up to `reach` either way; 0 leaves it as it is, in every bit.

    Of a rule that holds the update-to-weight ratio (`lbw-guard`), the first multiple steers the set-point: its loop
    takes account of the scale that was executed, so that ratio and set-point move together.

    Args:
        proposal: of the rule. Where it skips or rolls back, that is what happens.
        unit: positions of the two multiples, clipped to [-1, 1].
        reach: see `REACH`.
    """
    if proposal.directive is not Directive.PROCEED:
        return proposal
    lr, momentum = (log_interpolate(float(u), (1.0 / r, r)) for u, r in zip(unit, reach, strict=True))
    return replace(proposal, lr_scale=proposal.lr_scale * lr, momentum_scale=proposal.momentum_scale * momentum)


def relative(signals: Mapping[str, Any], proposed_lr_scale: Any) -> dict[str, Any]:
    """Signals as a steering policy sees them: the executed learning-rate scale in units of what the rule had proposed.

    So nothing that it sees depends on how wrong the base rate is.

    Args:
        signals: signal name → value, or values of n runs.
        proposed_lr_scale: by the rule at the decision before, of the same shape; NaN before the first.
    """
    return {**signals, "lr_scale": signals["lr_scale"] / proposed_lr_scale}
