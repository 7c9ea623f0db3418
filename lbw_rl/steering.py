"""Actions relative to a rule: what a policy multiplies, what it is told of its last multiple, and how long one holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbw_rl.action import Action, Directive, log_interpolate
from lbw_rl.features import progress_seen

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
        proposed_lr_scale: by the rule at the decision before, of the same shape; NaN before the first. Of 0 there is no multiple.
    """
    known = np.where(np.asarray(proposed_lr_scale) > 0, proposed_lr_scale, np.nan)
    return {**signals, "lr_scale": signals["lr_scale"] / known}


class Stretches:
    """Tells n runs when a new action is due: where a part of the run begins, or at every decision.

    The first part begins at a run's second decision: at the first nothing is measured yet.

    Args:
        n: number of runs.
        parts: equal parts of a run in each of which one action is held; None: every decision has its own.
    """

    def __init__(self, n: int, parts: int | None) -> None:
        self._parts = parts
        self._at = np.full(n, -2)  # the part that a run is in; -2: not asked yet; -1: asked once

    def __call__(self, features: NDArray[Any]) -> NDArray[np.bool_]:
        """One decision: what each run sees, shape (n, len(FEATURES)) → which take a new action, shape (n,)."""
        if self._parts is None:
            return np.ones(len(self._at), dtype=bool)
        begun = np.floor(self._parts * progress_seen(features) + 1e-6)  # single precision must do
        part = begun.clip(0, self._parts - 1).astype(int)
        due: NDArray[np.bool_] = (self._at > -2) & (part > self._at)
        self._at = np.where(self._at == -2, -1, np.maximum(self._at, part))
        return due

    def state_dict(self) -> dict[str, Any]:
        """Where the runs are."""
        return {"at": self._at.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self._at = np.array(state["at"])
