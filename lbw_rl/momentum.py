"""Where an optimizer's parameter group keeps its momentum, if what it keeps there is one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch


def momentum_of(group: Mapping[str, Any]) -> tuple[Literal["betas", "momentum"], float] | None:
    """The key of a parameter group's momentum and its value in [0, 1); None where there is none that is usable.

    β1 of Schedule-Free (Defazio et al. 2405.15682) is none: it says at which point between the average x and z the gradient
    is taken, and `eval` and `train` find x again with the value in the group. Another one during steps would leave them
    with weights that are not x.
    """
    if "train_mode" in group:  # Schedule-Free's own mark
        return None
    key: Literal["betas", "momentum"] = "betas" if group.get("betas") is not None else "momentum"
    value = group.get(key)
    try:
        value = float(value[0]) if key == "betas" else float(value)  # type: ignore[index,arg-type]  # whatever is there
    except (TypeError, ValueError, IndexError, RuntimeError):  # some optimizers write None for "no momentum"
        return None
    return (key, value) if math.isfinite(value) and 0 <= value < 1 else None


def scheduled_momentum(group: Mapping[str, Any]) -> float | None:
    """The value of `momentum_of`, 0 where a group has neither key; None where there is none to be read without waiting.

    A schedule may move it from step to step, as torch's OneCycleLR does.
    """
    held = [group[key] for key in ("betas", "momentum") if group.get(key) is not None]
    if not held:
        return 0.0
    first = held[0][0] if isinstance(held[0], tuple | list) and held[0] else held[0]
    if isinstance(first, torch.Tensor) and first.device.type != "cpu":
        return None
    found = momentum_of(group)
    return found[1] if found is not None else None
