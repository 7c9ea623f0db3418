"""Withholds a poisoned update on the device itself, where waiting for the host to see it would cost a sync."""

from __future__ import annotations

from typing import Any

import torch

_MISSING = object()


class DeviceGuard:
    """Arms one optimizer step with a condition that only the device knows yet.

    A fused optimizer is told through `found_inf`, as `GradScaler` does: it then changes no weight, no moment and no
    step count. For any other the gradients are set to zero where the condition holds: the weights are spared the
    poison, while moments decay and decoupled weight decay acts for that one step.

    Args:
        optimizer: to be guarded.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer: Any = optimizer
        self._armed = False
        self._previous: Any = _MISSING

    @torch.no_grad()
    def arm(self, bad: torch.Tensor, *, by_gradients: bool = False) -> None:
        """Withholds the coming step where `bad`, a 0-d bool on the device, turns out to be true.

        Args:
            bad: the condition.
            by_gradients: zero the gradients of a fused optimizer too: its own step is not the one that moves.
        """
        if not by_gradients and getattr(self.optimizer, "_step_supports_amp_scaling", False):
            found_inf = getattr(self.optimizer, "found_inf", None)
            self._previous = getattr(self.optimizer, "found_inf", _MISSING)
            flag = bad.to(torch.float32)
            self.optimizer.found_inf = flag if found_inf is None else torch.maximum(found_inf, flag)
            self._armed = True
            return
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradient = parameter.grad
                    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
                    (local._values() if local.is_sparse else local).masked_fill_(bad, 0.0)

    def disarm(self) -> None:
        """After the step: leaves the optimizer's attributes as they were."""
        if not self._armed:
            return
        self._armed = False
        if self._previous is not _MISSING:
            self.optimizer.found_inf = self._previous
        elif hasattr(self.optimizer, "found_inf"):
            del self.optimizer.found_inf
        self._previous = _MISSING
