"""The optimizer and the schedule of a run, as a careful user of plain torch would set them up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from lbw_rl.envs.reactive import ReactiveSchedule
from lbw_rl.envs.recipe import OptimizerSpec, ScheduleSpec
from lbw_rl.envs.rivals import build_rival
from lbw_rl.param_groups import split_parameter_groups


def build_optimizer(spec: OptimizerSpec, model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    """Builds the optimizer over the trainable weights of `model`.

    Weight decay holds for matrices and embeddings; biases and norm gains (one dimension) are in a second
    parameter group without it.

    With `per_tensor` each tensor then has a group of its own, named after it.

    Args:
        spec: the recipe's `[optimizer]` section.
        model: its parameters with `requires_grad` are optimized.
        lr: peak learning rate, multiplier included.

    Raises:
        ModuleNotFoundError: an optimizer of `lbw_rl.envs.rivals` whose package is missing.
    """
    trainable = [(name, p) if spec.per_tensor else p for name, p in model.named_parameters() if p.requires_grad]
    matrix = [p.ndim >= 2 for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p, m in zip(trainable, matrix) if m], "weight_decay": spec.weight_decay},
        {"params": [p for p, m in zip(trainable, matrix) if not m], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = _build(spec, groups, lr)
    if spec.per_tensor:
        split_parameter_groups(optimizer)
    return optimizer


def _build(spec: OptimizerSpec, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    foreach = spec.implementation == "foreach"
    fused = spec.implementation == "fused"
    if spec.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=spec.betas, eps=spec.eps, foreach=foreach, fused=fused or None)
    if spec.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=spec.momentum, foreach=foreach, fused=fused or None)
    if spec.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=lr, foreach=foreach)
    return build_rival(spec, groups, lr)


def build_scheduler(
    spec: ScheduleSpec, optimizer: torch.optim.Optimizer, total_steps: int
) -> LambdaLR | ReactiveSchedule:
    """The schedule as a `LambdaLR` over `schedule_multiplier`, or one that is told the loss of every step."""
    if spec.name in ("greedy", "plateau"):
        return ReactiveSchedule(spec, optimizer, total_steps)
    return LambdaLR(optimizer, schedule_multiplier(spec, total_steps))


def schedule_multiplier(spec: ScheduleSpec, total_steps: int) -> Callable[[int], float]:
    """Step → multiple of the peak learning rate, in closed form, for the optimizer step with that number.

    With w warmup steps, T total steps and p = (step − w) / (T − w): warmup is (step + 1) / w for step < w,
    never 0, so that the first step trains and nobody divides by a learning rate of zero. Then constant: 1;
    linear: 1 − p; cosine: (1 + cos πp) / 2; wsd: min(1, (T − step) / D) with D = decay_fraction · T
    (warmup-stable-decay, Hu et al. 2404.06395, with a linear decay). 0 from step T on, except constant.
    """
    warmup = spec.warmup_steps
    decay = max(1.0, spec.decay_fraction * total_steps)

    def multiplier(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if spec.name == "constant":
            return 1.0
        if step >= total_steps:
            return 0.0
        progress = (step - warmup) / (total_steps - warmup)
        if spec.name == "linear":
            return 1.0 - progress
        if spec.name == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        return min(1.0, (total_steps - step) / decay)

    return multiplier
