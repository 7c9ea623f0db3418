"""Declared bounds on what governance may do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lbw_rl.action import Action


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
    hand_over: bool = Field(
        False, description="whether steps of Adam and AdamW may be executed as SGD with momentum (`Action.hand_over`)"
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

    @classmethod
    def of(cls, rights: Authority | Mapping[str, Any] | None) -> Authority:
        """The authority itself, one of the mapping's fields, or the default.

        Raises:
            ValueError: a field that there is not, or a value that it does not take.
        """
        return rights if isinstance(rights, Authority) else cls(**(rights or {}))

    def clip(self, action: Action, previous_lr_scale: float = 1.0) -> tuple[Action, list[str]]:
        """Holds the scales of a finite action to the bounds, and a hand-over to the permission; says what it changed.

        Args:
            action: the proposal; its scales must be finite.
            previous_lr_scale: the scale executed last, from which `slew_up` counts.

        Returns:
            The action as far as it is permitted, and one reason per change.
        """
        reasons: list[str] = []
        lr = _clip(action.lr_scale, self.lr_scale, "lr_scale", reasons)
        ceiling = max(previous_lr_scale, self.lr_scale[0]) * self.slew_up
        if lr > ceiling:
            reasons.append(f"lr_scale {lr:.4g} held to {ceiling:.4g} by slew_up")
            lr = ceiling
        momentum = _clip(action.momentum_scale, self.momentum_scale, "momentum_scale", reasons)
        hand_over = action.hand_over and self.hand_over
        if hand_over != action.hand_over:
            reasons.append("hand-over denied: the authority does not permit it")
        if not reasons:
            return action, reasons
        return replace(action, lr_scale=lr, momentum_scale=momentum, hand_over=hand_over), reasons


def _clip(value: float, bounds: tuple[float, float], name: str, reasons: list[str]) -> float:
    clipped = min(bounds[1], max(bounds[0], value))
    if clipped != value:
        reasons.append(f"{name} {value:.4g} outside [{bounds[0]:g}, {bounds[1]:g}]")
    return clipped
