"""Collects losses and token counts between two decisions, from the caller or from the model's own output."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch


class Observer:
    """Accumulates what one decision window brings, without a host transfer.

    What the caller passes takes precedence over what the model's forward pass shows, so that nothing counts twice.
    """

    def __init__(self, model: torch.nn.Module | None) -> None:
        self._explicit: list[torch.Tensor] = []
        self._from_model: list[torch.Tensor] = []
        self.grad_norm: torch.Tensor | float | None = None
        self._explicit_tokens = self._model_tokens = 0
        self._steps = 0
        self._since = time.perf_counter()
        self._hook = model.register_forward_hook(self._on_forward, with_kwargs=True) if model is not None else None

    def loss(self, value: torch.Tensor | float) -> None:
        """Takes in one micro-batch's loss."""
        self._explicit.append(torch.as_tensor(value).detach())

    def tokens(self, count: int) -> None:
        """Adds to the window's tokens."""
        self._explicit_tokens += count

    def step_done(self) -> None:
        """Counts one optimizer step of the window; the norm that the caller gave was that step's."""
        self._steps += 1
        self.grad_norm = None

    def collect(self) -> tuple[torch.Tensor | None, torch.Tensor | float | None, dict[str, float]]:
        """Ends the window: mean loss, gradient norm if the caller gave one, and the clock's signals."""
        losses = self._explicit or self._from_model
        tokens = self._explicit_tokens or self._model_tokens
        now = time.perf_counter()
        clock = {}
        if self._steps:
            clock["step_seconds"] = (now - self._since) / self._steps
            if tokens:
                clock["tokens_per_second"] = tokens / (now - self._since)
        grad_norm, self.grad_norm = self.grad_norm, None
        self._explicit, self._from_model, self._steps, self._since = [], [], 0, now
        self._explicit_tokens = self._model_tokens = 0
        loss = losses[0].float().mean() if len(losses) == 1 else None
        if len(losses) > 1:
            loss = torch.stack([x.float().mean().to(losses[-1].device) for x in losses]).mean()
        return loss, grad_norm, clock

    def state_dict(self) -> dict[str, Any]:
        """The window so far: a checkpoint may fall between two decisions."""
        return {
            "explicit": list(self._explicit),
            "from_model": list(self._from_model),
            "grad_norm": self.grad_norm,
            "tokens": [self._explicit_tokens, self._model_tokens],
            "steps": self._steps,
            "elapsed": time.perf_counter() - self._since,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self._explicit, self._from_model = list(state["explicit"]), list(state["from_model"])
        self.grad_norm, self._steps = state["grad_norm"], state["steps"]
        self._explicit_tokens, self._model_tokens = state["tokens"]
        self._since = time.perf_counter() - state["elapsed"]

    def close(self) -> None:
        """Takes the hook off the model."""
        if self._hook is not None:
            self._hook.remove()

    def _on_forward(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return  # an evaluation in the middle of a window is no training signal
        loss = getattr(output, "loss", None)
        if isinstance(loss, torch.Tensor):
            self._from_model.append(_own_mean(loss.detach(), kwargs))
        inputs = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(inputs, torch.Tensor) and not inputs.is_floating_point():
            self._model_tokens += inputs.numel()


def _own_mean(loss: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
    """A micro-batch's mean loss, where the caller had it divided by the tokens of all micro-batches together.

    Hugging Face's `Trainer` does, with `num_items_in_batch`: each loss is then that micro-batch's share only.
    """
    total, labels = inputs.get("num_items_in_batch"), inputs.get("labels")
    if total is None or not isinstance(labels, torch.Tensor):
        return loss
    targets = inputs["shift_labels"] if inputs.get("shift_labels") is not None else labels[..., 1:]
    return loss * total / (targets != -100).sum().clamp_min(1)
