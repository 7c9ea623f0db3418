"""Collects losses and token counts between two decisions, from the caller or from the model's own output."""

from __future__ import annotations

import time
from typing import Any

import torch


class Observer:
    """Accumulates what one decision window brings, without a host transfer.

    A loss that the caller passes takes precedence over the model's own `.loss`, so that nothing counts twice.
    """

    def __init__(self, model: torch.nn.Module | None) -> None:
        self._explicit: list[torch.Tensor] = []
        self._from_model: list[torch.Tensor] = []
        self.grad_norm: torch.Tensor | float | None = None
        self._tokens = 0
        self._steps = 0
        self._since = time.perf_counter()
        self._hook = model.register_forward_hook(self._on_forward, with_kwargs=True) if model is not None else None

    def loss(self, value: torch.Tensor | float) -> None:
        """Takes in one micro-batch's loss."""
        self._explicit.append(torch.as_tensor(value).detach())

    def tokens(self, count: int) -> None:
        """Adds to the window's tokens."""
        self._tokens += count

    def step_done(self) -> None:
        """Counts one optimizer step of the window."""
        self._steps += 1

    def collect(self) -> tuple[torch.Tensor | None, torch.Tensor | float | None, dict[str, float]]:
        """Ends the window: mean loss, gradient norm if the caller gave one, and the clock's signals."""
        losses = self._explicit or self._from_model
        loss = torch.stack([x.float().mean() for x in losses]).mean() if losses else None
        now = time.perf_counter()
        clock = {}
        if self._steps:
            clock["step_seconds"] = (now - self._since) / self._steps
            if self._tokens:
                clock["tokens_per_second"] = self._tokens / (now - self._since)
        grad_norm, self.grad_norm = self.grad_norm, None
        self._explicit, self._from_model, self._tokens, self._steps, self._since = [], [], 0, 0, now
        return loss, grad_norm, clock

    def close(self) -> None:
        """Takes the hook off the model."""
        if self._hook is not None:
            self._hook.remove()

    def _on_forward(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return  # an evaluation in the middle of a window is no training signal
        loss = getattr(output, "loss", None)
        if isinstance(loss, torch.Tensor):
            self._from_model.append(loss.detach())
        inputs = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(inputs, torch.Tensor) and not inputs.is_floating_point():
            self._tokens += inputs.numel()
