"""Collects losses and token counts between two decisions, from the caller or from the model's own output."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Window:
    """What one decision window brought.

    Attributes:
        loss: mean over its micro-batches, 0-d; None if none was observed.
        step_loss: mean over those of the step at hand, where there were steps before it in the window.
        grad_norm: the step's global norm before clipping, where the caller or a clipping told it.
        clock: signal name → value.
    """

    loss: torch.Tensor | None
    step_loss: torch.Tensor | None
    grad_norm: torch.Tensor | float | None
    clock: dict[str, float]


class Observer:
    """Accumulates what one decision window brings, without a host transfer.

    What the caller passes takes precedence over what the model's forward pass shows, so that nothing counts twice.

    Args:
        model: whose forward passes are heard; None for none.
        fault: told (source, error) of a forward pass that could not be read.
    """

    def __init__(self, model: torch.nn.Module | None, fault: Callable[[str, Exception], None]) -> None:
        self._fault = fault
        self._explicit: list[torch.Tensor] = []
        self._from_model: list[torch.Tensor] = []
        self._deaf = False
        self._grad_norm: torch.Tensor | float | None = None
        self._explicit_tokens = self._model_tokens = 0
        self._steps = 0
        self._earlier = (0, 0)  # losses, of either source, that belong to earlier steps of the window
        self._since = time.perf_counter()
        self._hook = model.register_forward_hook(self._on_forward, with_kwargs=True) if model is not None else None

    def __reduce__(self) -> tuple[Any, ...]:
        return _deaf, ()  # a copy of the model, or a file of it, brings its hook along: it must not collect for nobody

    def loss(self, value: torch.Tensor | float) -> None:
        """Takes in one micro-batch's loss."""
        self._explicit.append(torch.as_tensor(value).detach().clone())  # which the caller may go on to divide in place

    def closure_loss(self, value: Any) -> None:
        """Takes in what an optimizer's closure returned, where nobody else told the loss of this step."""
        if isinstance(value, torch.Tensor | float) and (len(self._explicit), len(self._from_model)) == self._earlier:
            self.loss(value)

    def grad_norm(self, value: torch.Tensor | float) -> None:
        """Takes in this step's global norm before clipping."""
        self._grad_norm = value.detach() if isinstance(value, torch.Tensor) else value

    def tokens(self, count: int) -> None:
        """Adds to the window's tokens."""
        self._explicit_tokens += count

    def step_done(self) -> None:
        """Counts one optimizer step of the window; the norm that the caller gave was that step's."""
        self._steps += 1
        self._grad_norm = None
        self._earlier = (len(self._explicit), len(self._from_model))

    def peek(self, *, alone: bool) -> tuple[torch.Tensor | None, torch.Tensor | float | None]:
        """The loss and norm of the step at hand, within a window that goes on; the loss only for a process alone."""
        losses, earlier = (self._explicit, self._earlier[0]) if self._explicit else (self._from_model, self._earlier[1])
        return (_means(losses[earlier:], 0, alone=True)[0] if alone else None), self._grad_norm

    def collect(self, *, alone: bool) -> Window:
        """Ends the window of a process alone, or of one among others."""
        losses, earlier = (self._explicit, self._earlier[0]) if self._explicit else (self._from_model, self._earlier[1])
        tokens = self._explicit_tokens or self._model_tokens
        now = time.perf_counter()
        clock = {}
        if self._steps:
            clock["step_seconds"] = (now - self._since) / self._steps
            if tokens:
                clock["tokens_per_second"] = tokens / (now - self._since)
        norm = self._grad_norm
        self._explicit, self._from_model, self._grad_norm = [], [], None
        self._steps, self._since, self._earlier = 0, now, (0, 0)
        self._explicit_tokens = self._model_tokens = 0
        return Window(*_means(losses, earlier, alone=alone), norm, clock)

    def state_dict(self) -> dict[str, Any]:
        """The window so far: a checkpoint may fall between two decisions."""
        return {
            "explicit": list(self._explicit),
            "from_model": list(self._from_model),
            "grad_norm": self._grad_norm,
            "tokens": [self._explicit_tokens, self._model_tokens],
            "steps": self._steps,
            "earlier": list(self._earlier),
            "elapsed": time.perf_counter() - self._since,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self._explicit, self._from_model = list(state["explicit"]), list(state["from_model"])
        self._grad_norm, self._steps = state["grad_norm"], state["steps"]
        self._earlier = (state["earlier"][0], state["earlier"][1])
        self._explicit_tokens, self._model_tokens = state["tokens"]
        self._since = time.perf_counter() - state["elapsed"]

    def close(self) -> None:
        """Takes the hook off the model."""
        if self._hook is not None:
            self._hook.remove()

    @torch.compiler.disable
    def _on_forward(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._deaf or not (module.training and torch.is_grad_enabled()):
            return  # an evaluation in the middle of a window is no training signal
        try:
            self._hear(module, args, kwargs, output)
        except Exception as e:  # an exception here would be one of the model's
            self._fault("observer", e)

    def _hear(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(loss, torch.Tensor):
            self._from_model.append(_own_mean(module, loss.detach().clone(), kwargs))
        inputs = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(inputs, torch.Tensor) and not inputs.is_floating_point():
            self._model_tokens += inputs.numel()


def _deaf() -> Observer:
    """One that hears nothing."""
    observer = Observer(None, _tell_nobody)
    observer._deaf = True
    return observer


def _tell_nobody(source: str, error: Exception) -> None:
    pass


def _means(losses: list[torch.Tensor], earlier: int, *, alone: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The mean of a window's losses and, where earlier steps brought some of them, of the latest step's.

    What was not finite at an earlier step has had its consequences; it must not make the step at hand look poisoned. Nor must,
    for a process `alone`, a batch that the loop or a `GradScaler` has dropped before: one loss of several that is not finite
    is left out, since the gradients tell whether it is among them. With ranks it stays, to name the rank.
    """
    if not losses:
        return None, None
    if len(losses) == 1:
        loss = losses[0].float().mean()
        return loss, (None if earlier == 0 else loss.new_tensor(0.0))
    stacked = torch.stack([x.float().mean().to(losses[-1].device) for x in losses])
    mean_at_hand = _finite_mean if alone else torch.mean
    if earlier == 0:
        return mean_at_hand(stacked), None
    latest = mean_at_hand(stacked[earlier:]) if earlier < len(losses) else stacked.new_zeros(())
    return _finite_mean(stacked), latest


def _finite_mean(values: torch.Tensor) -> torch.Tensor:
    finite = values.isfinite()
    return torch.where(finite, values, 0.0).sum() / finite.sum()


def _own_mean(module: torch.nn.Module, loss: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
    """A micro-batch's mean loss, where the caller had it divided by the tokens of all micro-batches together.

    Hugging Face's `Trainer` does, with `num_items_in_batch`: each loss is then that micro-batch's share only. So do the
    losses of causal language models, those that see images among them, which shift their labels; others mostly ignore the argument.
    """
    kind = getattr(module, "loss_type", "ForCausalLM")
    encoder = getattr(getattr(module, "config", None), "is_encoder_decoder", False)  # T5 and its kin: their own loss
    if kind not in ("ForCausalLM", "ForConditionalGeneration") or encoder:
        return loss
    total, labels = inputs.get("num_items_in_batch"), inputs.get("labels")
    if total is None or not isinstance(labels, torch.Tensor):
        return loss
    targets = inputs["shift_labels"] if inputs.get("shift_labels") is not None else labels[..., 1:]
    own = (targets != -100).sum().clamp_min(1)
    return loss * torch.as_tensor(total, device=loss.device) / own.to(loss.device)
