"""Declared bounds on what governance may do, and the enforcement that no controller can get around."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lbw_rl.action import NEUTRAL, Action, Directive


class Authority(BaseModel):
    """What a controller may do to a run. Without arguments: safe for a large run.

    The default can slow a run down a hundredfold but speed it up by a quarter at most, may skip a bad
    batch now and then, and never rolls back.

    Raises:
        pydantic.ValidationError (a `ValueError`): a range that is not 0 < low ≤ 1 ≤ high < ∞, or an unknown field.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lr_scale: tuple[float, float] = Field((0.01, 1.25), description="range of the learning-rate scale; holds 1")
    momentum_scale: tuple[float, float] = Field(
        (0.5, 1.25), description="range of the scale of the momentum's averaging horizon; holds 1"
    )
    slew_up: float = Field(
        1.5,
        gt=1.0,
        description="largest factor by which the learning-rate scale may rise from one decision to the next; cuts may be immediate",
    )
    max_skips: int = Field(10, ge=0, description="updates that may be skipped within `skip_window` decisions")
    skip_window: int = Field(100, ge=1, description="decisions over which `max_skips` counts")
    max_rollbacks: int = Field(
        0, ge=0, description="rollbacks allowed in the whole run; 0 also means that no snapshots are kept"
    )
    rollback_cooldown: int = Field(50, ge=0, description="decisions that must pass between two rollbacks")
    snapshot_every: int = Field(
        50,
        ge=1,
        description="optimizer steps between two copies of the last good state, where rollbacks are allowed",
    )
    suspend_after: int = Field(
        5, ge=1, description="controller faults (exceptions, non-finite actions) after which it is suspended"
    )

    @field_validator("lr_scale", "momentum_scale")
    @classmethod
    def _holds_one(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        low, high = bounds
        if not (0.0 < low <= 1.0 <= high < math.inf):
            raise ValueError(
                f"{bounds} must be (low, high) with 0 < low <= 1 <= high < inf, so that leaving alone is allowed"
            )
        return bounds

    def clip(self, action: Action, previous_lr_scale: float = 1.0) -> tuple[Action, list[str]]:
        """Holds the scales of a finite action to the bounds; says what it changed and why.

        Args:
            action: the proposal; its scales must be finite.
            previous_lr_scale: the scale executed last, from which `slew_up` counts.

        Returns:
            The action with its scales clipped, and one reason per change.
        """
        reasons: list[str] = []
        lr = _clip(action.lr_scale, self.lr_scale, "lr_scale", reasons)
        ceiling = max(previous_lr_scale, self.lr_scale[0]) * self.slew_up
        if lr > ceiling:
            reasons.append(f"lr_scale {lr:.4g} held to {ceiling:.4g} by slew_up")
            lr = ceiling
        momentum = _clip(action.momentum_scale, self.momentum_scale, "momentum_scale", reasons)
        if not reasons:
            return action, reasons
        return replace(action, lr_scale=lr, momentum_scale=momentum), reasons


def _clip(value: float, bounds: tuple[float, float], name: str, reasons: list[str]) -> float:
    clipped = min(bounds[1], max(bounds[0], value))
    if clipped != value:
        reasons.append(f"{name} {value:.4g} outside [{bounds[0]:g}, {bounds[1]:g}]")
    return clipped


@dataclass(frozen=True, slots=True)
class Ruling:
    """What the authority made of a proposal: the action to execute and why it differs."""

    action: Action
    reasons: tuple[str, ...] = ()


class Enforcer:
    """The authority in force over one run: bounds plus the budgets that need a memory.

    Every proposal passes through `rule`; what comes out lies within the authority whatever went in.
    """

    def __init__(self, authority: Authority) -> None:
        self.authority = authority
        self.lr_scale = 1.0
        self.decisions = 0
        self.faults = 0
        self.rollbacks = 0
        self._last_rollback: int | None = None
        self._skips: list[int] = []

    @property
    def suspended(self) -> bool:
        """Whether the controller has lost its authority for good (fail-open)."""
        return self.faults >= self.authority.suspend_after

    def rule(self, proposed: Action | None, fault: str | None = None, *, restorable: bool = True) -> Ruling:
        """Rules on one proposal.

        Args:
            proposed: the controller's action; anything that is not a well-formed finite `Action` is a fault.
            fault: the text of the exception if the controller raised one.
            restorable: whether there is a last good state to roll back to.

        Returns:
            The executed action. A fault, and every decision after suspension, becomes the neutral action.
        """
        self.decisions += 1
        if self.suspended:
            return self._fail_open("suspended", ["controller suspended"])
        fault = fault or _malformed(proposed)
        if fault or proposed is None:
            self.faults += 1
            reasons = [f"controller fault: {fault}"]
            if self.suspended:
                reasons.append(f"suspended after {self.faults} faults")
            return self._fail_open("fault", reasons)
        action, reasons = self.authority.clip(_plain(proposed), self.lr_scale)
        if action.directive is Directive.ROLLBACK and (denied := self._rollback_denied(restorable)):
            action = replace(action, directive=Directive.PROCEED)
            reasons.append(denied)
        if action.directive is Directive.SKIP and (denied := self._skip_denied()):
            action = replace(action, directive=Directive.PROCEED)
            reasons.append(denied)
        if action.directive is not Directive.PROCEED and action.lr_scale > self.lr_scale:
            # A step that does not happen executes no scale: it is no rung to climb past the slew limit on.
            action = replace(action, lr_scale=self.lr_scale)
            reasons.append(f"lr_scale held to {self.lr_scale:.4g}: no update is executed")
        return self._settle(action, reasons)

    def let_go(self, executed: float) -> Action:
        """The neutral action within the slew limit, for a step whose own ruling could not be executed.

        Args:
            executed: the learning-rate scale executed last.
        """
        self.lr_scale = executed
        return self._fail_open("fault", []).action

    def _fail_open(self, regime: str, reasons: list[str]) -> Ruling:
        # Letting go obeys the slew limit too: a jump from a deep cut to the full rate would be a spike of our making.
        action, held = self.authority.clip(NEUTRAL, self.lr_scale)
        return self._settle(replace(action, regime=regime), reasons + held)

    def _settle(self, action: Action, reasons: list[str]) -> Ruling:
        self.lr_scale = action.lr_scale
        if action.directive is Directive.SKIP:
            self._skips.append(self.decisions)
        elif action.directive is Directive.ROLLBACK:
            self.rollbacks += 1
            self._last_rollback = self.decisions
        return Ruling(action, tuple(reasons))

    def _skip_denied(self) -> str | None:
        since = self.decisions - self.authority.skip_window
        self._skips = [d for d in self._skips if d > since]
        if len(self._skips) < self.authority.max_skips:
            return None
        return f"skip denied: {len(self._skips)} in the last {self.authority.skip_window} decisions, {self.authority.max_skips} allowed"

    def _rollback_denied(self, restorable: bool) -> str | None:
        a = self.authority
        if self.rollbacks >= a.max_rollbacks:
            return f"rollback denied: {self.rollbacks} done, {a.max_rollbacks} allowed"
        if self._last_rollback is not None and self.decisions - self._last_rollback < a.rollback_cooldown:
            return f"rollback denied: cooling down for {a.rollback_cooldown} decisions after the last one"
        return None if restorable else "rollback denied: no good state has been kept"

    def state_dict(self) -> dict[str, Any]:
        """Counters and budgets, as JSON data."""
        return {
            "lr_scale": self.lr_scale,
            "decisions": self.decisions,
            "faults": self.faults,
            "rollbacks": self.rollbacks,
            "last_rollback": self._last_rollback,
            "skips": list(self._skips),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`'s counters and budgets."""
        self.lr_scale = state["lr_scale"]
        self.decisions = state["decisions"]
        self.faults = state["faults"]
        self.rollbacks = state["rollbacks"]
        self._last_rollback = state["last_rollback"]
        self._skips = list(state["skips"])


def _malformed(proposed: object) -> str | None:
    """Why `proposed` is no executable action, or None."""
    if not isinstance(proposed, Action):
        return f"act returned {type(proposed).__name__}, not an Action"
    for name in ("lr_scale", "momentum_scale"):
        value = getattr(proposed, name)
        if not _is_scale(value):
            return f"{name} is {value!r}, not a finite number >= 0"
    if not isinstance(proposed.directive, Directive):
        return f"directive is {proposed.directive!r}, not a Directive"
    if not isinstance(proposed.regime, str):
        return f"regime is {proposed.regime!r}, not a str"
    if not isinstance(proposed.evidence, Mapping):
        return f"evidence is {proposed.evidence!r}, not a mapping"
    return None


def _is_scale(value: object) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return 0 <= float(value) < math.inf
    except OverflowError:  # an int or a fraction past every float
        return False


def _plain(action: Action) -> Action:
    """The same action with Python floats: a numpy float32 would round the rate that it multiplies."""
    if type(action.lr_scale) is float and type(action.momentum_scale) is float:
        return action
    return replace(action, lr_scale=float(action.lr_scale), momentum_scale=float(action.momentum_scale))
