"""One step of an Adam optimizer executed as SGD with momentum, its own moments carried on.

With g the gradient that the optimizer got, η the rate of the step (schedule × scales), Λ SGD's rate in units of it and
β₁′ the momentum in force:

    m ← β₁′·m + (1 − β₁′)·g        Adam's first moment goes on as SGD's momentum buffer (dampening = β₁′)
    w ← w − η·λ·w − Λ·η·m          λ decoupled weight decay, at Adam's rate; a coupled one is part of g
    v ← β₂·v + (1 − β₂)·g²         and the step count goes on

The first two lines are the SGD phase of SWATS (Keskar & Socher 2017, 1712.07628, algorithm 1), whose buffer is
m/(1 − β₁) and starts at zero. SGD needs no v: it is kept up so that letting go at any step (the controller's wish, a
fault, suspension, another mode) continues Adam with the moments that it would have had from these gradients. A v left
behind would size the first step back by gradients of long ago.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.sgd import sgd

from lbw_rl.sample import is_sharded


def is_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is torch's Adam or AdamW itself: a subclass may have a rule of its own."""
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)


def decouples_decay(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether weight decay acts on the weights instead of entering the gradient."""
    return bool(group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)))


def impossible(optimizer: torch.optim.Optimizer) -> str | None:
    """Why this optimizer's step cannot be handed over now, None if it can; the same on every rank."""
    if not is_adam(optimizer):
        return f"{type(optimizer).__name__} is not torch's Adam or AdamW"
    if any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
        return "a GradScaler leaves unscaling to the fused optimizer"
    for setting in ("capturable", "differentiable"):
        if any(group[setting] for group in optimizer.param_groups):
            return f"the optimizer is {setting}"
    if any(len({is_sharded(p) for p in group["params"]}) > 1 for group in optimizer.param_groups):
        return "a parameter group mixes sharded and whole tensors"
    return None


@dataclass(slots=True)
class GroupStep:
    """The coming SGD step of one parameter group: those tensors that have a gradient and Adam's moments.

    A tensor without moments yet (its first gradient) is not among them: the optimizer's own step makes them.

    Attributes:
        group: hyperparameters, with the scales of the step written.
        rate: Λ, in units of the group's learning rate.
        decoupled: whether weight decay acts on the weights.
        parameters, gradients, exp_avg, exp_avg_sq, steps: alike in length.
        max_exp_avg_sq: of AMSGrad, else empty.
    """

    group: dict[str, Any]
    rate: float
    decoupled: bool
    parameters: list[torch.nn.Parameter] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)
    exp_avg: list[torch.Tensor | None] = field(default_factory=list)
    exp_avg_sq: list[torch.Tensor] = field(default_factory=list)
    max_exp_avg_sq: list[torch.Tensor] = field(default_factory=list)
    steps: list[torch.Tensor] = field(default_factory=list)

    def take(self, parameter: torch.nn.Parameter, state: dict[str, Any]) -> None:
        """Adds one tensor with the gradient that SGD is to follow."""
        gradient = parameter.grad
        assert gradient is not None
        self.parameters.append(parameter)
        gradient = -gradient if self.group["maximize"] else gradient
        decay = 0.0 if self.decoupled else self.group["weight_decay"]
        self.gradients.append(_real(gradient.add(parameter, alpha=decay) if decay else gradient))
        self.exp_avg.append(_real(state["exp_avg"]))
        self.exp_avg_sq.append(_real(state["exp_avg_sq"]))
        if self.group["amsgrad"]:
            self.max_exp_avg_sq.append(_real(state["max_exp_avg_sq"]))
        self.steps.append(state["step"])

    def execute(self) -> None:
        """Moves moments and weights."""
        group, gradients = self.group, self.gradients
        weights: list[torch.Tensor] = [_real(p) for p in self.parameters]
        beta1, beta2 = (float(beta) for beta in group["betas"])
        torch._foreach_mul_(self.exp_avg_sq, beta2)
        torch._foreach_addcmul_(self.exp_avg_sq, gradients, gradients, value=1.0 - beta2)
        if self.max_exp_avg_sq:
            torch._foreach_maximum_(self.max_exp_avg_sq, self.exp_avg_sq)
        torch._foreach_add_(self.steps, 1)
        if self.decoupled and group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        beta1 = max(beta1, sys.float_info.min)  # at exactly 0 SGD would pass the buffer by, which Adam overwrites
        sgd(
            weights,
            gradients,
            self.exp_avg,
            foreach=group["foreach"],  # never fused: that kernel goes astray on sharded tensors
            lr=group["lr"] * self.rate,
            momentum=beta1,
            dampening=beta1,
            weight_decay=0.0,
            nesterov=False,
            maximize=False,
        )


def prepare(optimizer: torch.optim.Optimizer, rate: float) -> list[GroupStep]:
    """Gathers all groups' steps and moves nothing yet.

    Args:
        optimizer: with the scales of the step written into its groups.
        rate: Λ.

    Raises:
        ValueError: the step cannot be handed over, or `rate` is not positive and finite.
    """
    reason = impossible(optimizer)
    if reason is not None:
        raise ValueError(f"hand_over: {reason}")
    if not 0.0 < rate < float("inf"):
        raise ValueError(f"hand_over: rate {rate} must be > 0 and finite")
    steps = []
    for group in optimizer.param_groups:
        step = GroupStep(group, rate, decouples_decay(optimizer, group))
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if parameter.grad is not None and not parameter.grad.is_sparse and state:
                step.take(parameter, state)
        if step.parameters:
            steps.append(step)
    return steps


def _real(tensor: torch.Tensor) -> torch.Tensor:
    """Adam treats a complex tensor as pairs of real numbers."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
