"""The enforcement of an authority, which no controller can get around."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from lbw_rl.action import NEUTRAL, Action, Directive
from lbw_rl.authority import Authority
from lbw_rl.stages import Mode


@dataclass(frozen=True, slots=True)
class Ruling:
    """What the authority made of a proposal: the action to execute and why it differs."""

    action: Action
    reasons: tuple[str, ...] = ()


class Enforcer:
    """The authority in force over one run: bounds plus the budgets that need a memory.

    Every proposal passes through `rule`; what comes out lies within the authority whatever went in.

    Args:
        authority: the bounds.
        mode: how much of them may be used now; "shadow" rules as "govern" does, for the record.
    """

    def __init__(self, authority: Authority, mode: Mode = "govern") -> None:
        self.authority = authority
        self.mode: Mode = mode
        self.lr_scale = 1.0
        self._group_lr_scales: tuple[float, ...] = ()
        self.decisions = 0
        self.faults = 0
        self.rollbacks = 0
        self._last_rollback: int | None = None
        self._skips: list[int] = []
        self._before_shadow: tuple[int, int | None, list[int]] = (0, None, [])

    @property
    def suspended(self) -> bool:
        """Whether the controller has lost its authority for good (fail-open)."""
        return self.faults >= self.authority.suspend_after

    def set_mode(self, mode: Mode) -> None:
        """Changes how much may be used, from the next ruling on."""
        if not {mode, self.mode} <= {"lr", "govern"}:  # no scale was in force, or none will be: the slew starts at 1
            self.lr_scale, self._group_lr_scales = 1.0, ()
        # What shadow mode would have done has cost nothing, and leaves no debt behind.
        if mode == "shadow" != self.mode:
            self._before_shadow = (self.rollbacks, self._last_rollback, list(self._skips))
        elif self.mode == "shadow" != mode:
            self.rollbacks, self._last_rollback, skips = self._before_shadow
            self._skips = list(skips)
        self.mode = mode

    def suspend(self) -> None:
        """Takes the controller's authority for good."""
        self.faults = max(self.faults, self.authority.suspend_after)

    def rule(
        self,
        proposed: Action | None,
        fault: str | None = None,
        *,
        restorable: bool = True,
        groups: int | None = None,
        late: bool = False,
        no_hand_over: str | None = None,
    ) -> Ruling:
        """Rules on one proposal.

        Args:
            proposed: the controller's action; anything that is not a well-formed finite `Action` is a fault.
            fault: the text of the exception if the controller raised one.
            restorable: whether there is a last good state to roll back to.
            groups: parameter groups of the optimizer; None leaves the number of `group_lr_scales` unchecked.
            late: whether the telemetry is that of an earlier step, whose update nothing can skip any more.
            no_hand_over: why the step cannot be handed over to SGD now; None if it can.

        Returns:
            The executed action. A fault, and every decision after suspension, becomes the neutral action.
        """
        self.decisions += 1
        if self.suspended:
            return self._fail_open("suspended", ["controller suspended"])
        fault = fault or _malformed(proposed, groups)
        if fault or proposed is None:
            self.faults += 1
            reasons = [f"controller fault: {fault}"]
            if self.suspended:
                reasons.append(f"suspended after {self.faults} faults")
            return self._fail_open("fault", reasons)
        action, reasons = self._permitted(_plain(proposed), late)
        action, more = self.authority.clip(action, self.lr_scale)
        reasons += more
        action = self._clip_groups(action, reasons, groups)
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
        if action.directive is not Directive.PROCEED:
            no_hand_over = "no update is executed"
        if action.hand_over and no_hand_over:
            action = replace(action, hand_over=False)
            reasons.append(f"hand-over denied: {no_hand_over}")
        return self._settle(action, reasons)

    def _permitted(self, action: Action, late: bool) -> tuple[Action, list[str]]:
        """What the mode leaves of a proposal."""
        reasons = []
        if self.mode == "skip" and (action.lr_scale, action.momentum_scale, action.group_lr_scales) != (1.0, 1.0, ()):
            action = replace(action, lr_scale=1.0, momentum_scale=1.0, group_lr_scales=())
            reasons.append("scales held to 1: mode is skip")
        if self.mode == "skip" and action.hand_over:
            action = replace(action, hand_over=False)
            reasons.append("hand-over denied: mode is skip")
        if self.mode in ("skip", "lr") and action.directive is Directive.ROLLBACK:
            action = replace(action, directive=Directive.PROCEED)
            reasons.append(f"rollback denied: mode is {self.mode}")
        if late and action.directive is Directive.SKIP:
            action = replace(action, directive=Directive.PROCEED)
            reasons.append("skip came late: the telemetry is that of an earlier step")
        return action, reasons

    def hold(self, action: Action, groups: int) -> Action:
        """An action of an earlier run, in whose authority it was, held to this one's."""
        held, reasons = self.authority.clip(action, self.lr_scale)
        return self._clip_groups(held, reasons, groups)

    def _clip_groups(self, action: Action, reasons: list[str], groups: int | None = None) -> Action:
        """The groups' multiples, so that each group's whole scale keeps to the range and the slew limit.

        An action without any means 1 for each: a group that was cut comes back no faster than that.
        """
        count = groups or len(action.group_lr_scales) or len(self._group_lr_scales)
        asked = action.group_lr_scales or (1.0,) * count
        previous = self._group_lr_scales if len(self._group_lr_scales) == len(asked) else (1.0,) * len(asked)
        if not action.group_lr_scales and set(previous) <= {1.0}:
            return action
        low, high = self.authority.lr_scale
        clipped = []
        for scale, before in zip(asked, previous):
            ceiling = min(high, max(self.lr_scale * before, low) * self.authority.slew_up)
            whole = min(ceiling, max(low, action.lr_scale * scale))
            clipped.append(scale if whole == action.lr_scale * scale else whole / action.lr_scale)
        if tuple(clipped) != asked:
            reasons.append(f"group_lr_scales held to [{low:g}, {high:g}] and the slew limit")
        unasked = not action.group_lr_scales and set(clipped) <= {1.0}
        return replace(action, group_lr_scales=() if unasked else tuple(clipped))

    def may_skip(self) -> bool:
        """Whether the budget of skips has one left."""
        return self._skip_denied() is None

    def note_skip(self) -> None:
        """Counts an update that was withheld without a ruling: between two decisions, or on the device."""
        self._skips.append(self.decisions)

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
        action = self._clip_groups(action, held)
        return self._settle(replace(action, regime=regime), reasons + held)

    def _settle(self, action: Action, reasons: list[str]) -> Ruling:
        self.lr_scale = action.lr_scale
        if action.directive is Directive.PROCEED:  # else nothing is executed: no group has climbed
            self._group_lr_scales = action.group_lr_scales
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
            "group_lr_scales": list(self._group_lr_scales),
            "decisions": self.decisions,
            "faults": self.faults,
            "rollbacks": self.rollbacks,
            "last_rollback": self._last_rollback,
            "skips": list(self._skips),
            "before_shadow": list(self._before_shadow),
        }

    def load_state_dict(self, state: Mapping[str, Any], mode: Mode | None = None) -> None:
        """Restores `state_dict`'s counters and budgets.

        Args:
            state: what `state_dict` returned.
            mode: that it was in; from another one than this, the same changes as `set_mode` makes. None: this one.
        """
        own = self.mode
        self.lr_scale, self._group_lr_scales = state["lr_scale"], tuple(state["group_lr_scales"])
        self.decisions = state["decisions"]
        self.faults = state["faults"]
        self.rollbacks = state["rollbacks"]
        self._last_rollback = state["last_rollback"]
        self._skips = list(state["skips"])
        rollbacks, last, skips = state["before_shadow"]
        self._before_shadow = (rollbacks, last, list(skips))
        if mode not in (None, own):
            self.mode = mode
            self.set_mode(own)


def _malformed(proposed: object, groups: int | None) -> str | None:
    """Why `proposed` is no executable action, or None."""
    if not isinstance(proposed, Action):
        return f"act returned {type(proposed).__name__}, not an Action"
    for name in ("lr_scale", "momentum_scale"):
        value = getattr(proposed, name)
        if not _is_scale(value):
            return f"{name} is {value!r}, not a finite number >= 0"
    scales = proposed.group_lr_scales
    if not isinstance(scales, tuple) or not all(_is_scale(s) for s in scales):
        return f"group_lr_scales is {scales!r}, not a tuple of finite numbers >= 0"
    if scales and groups is not None and len(scales) != groups:
        return f"group_lr_scales has {len(scales)} entries for {groups} parameter groups"
    if not isinstance(proposed.directive, Directive):
        return f"directive is {proposed.directive!r}, not a Directive"
    if not isinstance(proposed.hand_over, bool):
        return f"hand_over is {proposed.hand_over!r}, not a bool"
    if not isinstance(proposed.regime, str):
        return f"regime is {proposed.regime!r}, not a str"
    if not isinstance(proposed.evidence, Mapping):
        return f"evidence is {proposed.evidence!r}, not a mapping"
    try:
        dict(proposed.evidence)
    except Exception as e:
        return f"evidence cannot be read ({type(e).__name__}: {e})"
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
    if type(action.lr_scale) is float and type(action.momentum_scale) is float and not action.group_lr_scales:
        return action
    return replace(
        action,
        lr_scale=float(action.lr_scale),
        momentum_scale=float(action.momentum_scale),
        group_lr_scales=tuple(float(s) for s in action.group_lr_scales),
    )
