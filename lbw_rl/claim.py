"""Whose optimizer it is: the one whose hooks fire, and the one governor that may write to it."""

from __future__ import annotations

import weakref
from typing import Any

import torch

_GOVERNED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


class Claim:
    """One governor's claim to write to an optimizer, which no second one gets meanwhile.

    Two governors' restores would interleave and leave a scale in place for the scheduler to compound.

    Args:
        optimizer: to be claimed.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._held = False

    @property
    def refused(self) -> bool:
        """Whether another governor holds it."""
        return self._optimizer in _GOVERNED and not self._held

    def take(self) -> bool:
        """Claims the optimizer; False where another governor holds it."""
        if self.refused:
            return False
        _GOVERNED.add(self._optimizer)
        self._held = True
        return True

    def release(self) -> None:
        """Gives up this claim, if it is held, and nobody else's."""
        if self._held:
            _GOVERNED.discard(self._optimizer)
            self._held = False


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer whose hooks fire: Accelerate's and Lightning's wrappers only pass their steps on.

    Raises:
        ValueError: it is no optimizer, nor does it wrap one.
    """
    # By what they lack, not by name: Lightning's takes on the name of the class that it wraps.
    while "_optimizer_step_pre_hooks" not in getattr(optimizer, "__dict__", {}) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer: {type(optimizer).__name__} is none; accepted: a torch.optim.Optimizer")
    return optimizer
