"""What an optimizer's parameters tell of a run before its first step: how many weights, of which kind, with which momentum."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lbw_rl.momentum import momentum_of


@dataclass(frozen=True, slots=True)
class Trainable:
    """Facts that neither training nor sharding changes, so that a resumed run is told the same.

    Attributes:
        weights: elements of all trainable matrices (of all parameters where there is no matrix).
        low_rank: whether the matrices are the factors of low-rank adapters (LoRA, Hu et al. 2106.09685), whose own size
            says nothing about that of the weights which they correct.
        momentum: β1 or momentum of the first parameter group; 0 where the group has neither, None where what it has is not to
            be read as one (`momentum_of`).
        normalised: whether updates are divided by something of the gradient's size: all but SGD's kin, which have neither
            betas nor an ε to divide by.
    """

    weights: int
    low_rank: bool
    momentum: float | None
    normalised: bool


def trainable(optimizer: torch.optim.Optimizer) -> Trainable:
    """Reads the shapes, never the values, of what `optimizer` trains."""
    present = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad and p.numel()]
    matrices = [p for p in present if p.ndim >= 2]
    group = optimizer.param_groups[0] if optimizer.param_groups else {}
    found = momentum_of(group)
    without = all(group.get(key) is None for key in ("betas", "momentum"))
    return Trainable(
        weights=sum(p.numel() for p in matrices or present),
        low_rank=_are_factors([tuple(p.shape) for p in matrices]),
        momentum=found[1] if found is not None else 0.0 if without else None,
        normalised="betas" in group or "eps" in group,
    )


def _are_factors(shapes: list[tuple[int, ...]]) -> bool:
    """Whether matrices are pairs of factors: one rank, the smaller side of all of them, rows here and columns there.

    In a whole model the width is as often the smaller side, but some matrix of its attention is square.
    """
    ranks = {min(shape) for shape in shapes}
    tall = {shape[0] > shape[-1] for shape in shapes}
    thin = {max(shape) >= 2 * min(shape) for shape in shapes}
    return len(ranks) == 1 and tall == {True, False} and thin == {True}
