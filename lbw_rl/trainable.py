"""What an optimizer's parameters tell of a run before its first step: how many weights, of which kind, with which momentum."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lbw_rl.momentum import scheduled_momentum

_COMPRESSION = 3
"""Elements of the products for each one of the factors: r = d / 6 for a square layer. A feed-forward block (d → 4d → d) has 2."""


@dataclass(frozen=True, slots=True)
class Trainable:
    """Facts that neither training nor sharding changes, so that a resumed run is told the same.

    Attributes:
        weights: elements of all trainable matrices (of all parameters where there is no matrix).
        low_rank: whether most of them are in the factors of low-rank adapters (LoRA, Hu et al. 2106.09685), whose own size
            says nothing about that of the weights which they correct. Embeddings that are trained beside adapters are
            usually the larger part, and do have a size.
        momentum: β1 or momentum of the first parameter group, at the start; see `scheduled_momentum`.
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
    return Trainable(
        weights=sum(p.numel() for p in matrices or present),
        low_rank=_are_factors([(p.shape[0], p.numel() // p.shape[0]) for p in matrices]),
        momentum=scheduled_momentum(group),
        normalised="betas" in group or "eps" in group,
    )


def _are_factors(shapes: list[tuple[int, int]]) -> bool:
    """Whether most elements of the matrices are factors of low-rank products B·A, A (r, in) before its B (out, r).

    An optimizer knows no names. A and B are neighbours, as modules hold them, or stand at the same place of two halves, as groups
    of parameters with rates of their own do (LoRA+). The layers of a whole model make such pairs as well, since the width is a
    side of each; but the products of those are not `_COMPRESSION` times as large as the factors.
    """
    neighbours, i = [], 0
    while i + 1 < len(shapes):
        paired = shapes[i][0] == shapes[i + 1][1]
        neighbours += [(shapes[i], shapes[i + 1])] if paired else []
        i += 2 if paired else 1
    half = len(shapes) // 2
    halves = [(a, b) for a, b in zip(shapes[:half], shapes[half:]) if a[0] == b[1]]
    trained = sum(rows * columns for rows, columns in shapes)
    for pairs in (neighbours, halves):
        factors = sum(r * (inner + outer) for (r, inner), (outer, _) in pairs)
        products = sum(inner * outer for (_, inner), (outer, _) in pairs)
        if 2 * factors > trained and products >= _COMPRESSION * factors:
            return True
    return False
