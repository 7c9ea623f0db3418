"""N small models trained as one program.

Every tensor has a leading model axis, so that one `bmm` serves many models. All parameters live in one flat buffer
(and all gradients in another), which makes AdamW a dozen whole-fleet kernels with a learning rate and betas per model.
What the models are is told by a family (`lbw_rl.envs.families`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lbw_rl.envs.families.family import Family
from lbw_rl.envs.families.transformer import FleetShape

__all__ = ["AdamWState", "Fleet", "FleetShape", "FloatArray"]

FloatArray = NDArray[np.float64]

_ALIGNMENT = 64  # floats; every model starts on a SIMD boundary, so equal models take equal code paths
_GROUP = 16
"""Models per forward and backward pass: more would gain no speed, and their activations would be so large that malloc
hands the memory back to the system and pays for it anew at every step."""


class AdamWState:
    """First and second moments and step counts of a fleet, shapes (n, p), (n, p) and (n,)."""

    def __init__(self, n: int, p: int) -> None:
        self.mean = torch.zeros(n, p)
        self.square = torch.zeros(n, p)
        self.steps = np.zeros(n, dtype=np.int64)

    def reset(self, rows: Sequence[int]) -> None:
        """Zeroes the state of the models in `rows`."""
        index = torch.as_tensor(rows, dtype=torch.long)
        self.mean[index] = 0.0
        self.square[index] = 0.0
        self.steps[rows] = 0


@dataclass(frozen=True, slots=True)
class _Group:
    """The models in `rows`: name → parameters and gradients, views into the fleet's buffers."""

    rows: slice
    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]


class Fleet:
    """`n` models of one family, each with its own weights, data and AdamW hyper-parameters.

    Attributes:
        shape: the family.
        weights: all parameters, shape (n, p); the parameters of the program are views into it.
        grads: their gradients after `backward`, shape (n, p).
        matrices: number of leading columns of `weights` that belong to weight matrices.
        size: number of leading columns that hold parameters at all (the rest is padding, always 0).
    """

    def __init__(self, n: int, shape: Family | None = None) -> None:
        self.n = n
        self.shape: Family = shape or FleetShape()
        self._layout = dict(self.shape.parameters())
        self.matrices = sum(prod(s) for s in self._layout.values() if len(s) == 2)
        self.size = sum(prod(s) for s in self._layout.values())
        columns = -(-self.size // _ALIGNMENT) * _ALIGNMENT
        self.weights = torch.zeros(n, columns)
        self.grads = torch.zeros(n, columns)
        self.optimizer = AdamWState(n, columns)
        self._scratch = torch.empty(n, columns)
        self._groups = [self._group(slice(first, min(first + _GROUP, n))) for first in range(0, n, _GROUP)]

    def _group(self, rows: slice) -> _Group:
        parameters = {name: value.requires_grad_() for name, value in self._views(self.weights[rows])}
        return _Group(rows, parameters, dict(self._views(self.grads[rows])))

    def _views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name and view, shape (models, …), of every parameter in a buffer of shape (models, p)."""
        start = 0
        for name, shape in self._layout.items():
            stop = start + prod(shape)
            yield name, flat[:, start:stop].view(-1, *shape)
            start = stop

    # -- starting ------------------------------------------------------------------------------------

    def reset(
        self,
        rows: Sequence[int],
        generators: Sequence[np.random.Generator],
        scales: FloatArray | None = None,
    ) -> None:
        """Starts the models in `rows` afresh (weights and optimizer) and leaves the others untouched.

        Args:
            rows: indices of the models.
            generators: one per row; each draws its model's weights as the family says.
            scales: multiples of the drawn matrices, one per row; 1 if left out.
        """
        scales = np.ones(len(rows)) if scales is None else scales
        for row, generator, scale in zip(rows, generators, scales, strict=True):
            self.weights[row, : self.size] = torch.from_numpy(self.shape.draw(generator))
            if scale != 1.0:
                self.weights[row, : self.matrices] *= scale
        self.optimizer.reset(rows)

    def copy(self, rows: Sequence[int]) -> Fleet:
        """A separate fleet that holds the models in `rows`, optimizer state included."""
        index = torch.as_tensor(rows, dtype=torch.long)
        other = Fleet(len(rows), self.shape)
        for mine, theirs in zip(self._buffers(), other._buffers(), strict=True):
            theirs.copy_(mine[index])
        other.optimizer.steps[:] = self.optimizer.steps[rows]
        return other

    def paste(self, rows: Sequence[int], other: Fleet) -> None:
        """Takes `other`'s models, optimizer state included, as those in `rows`."""
        index = torch.as_tensor(rows, dtype=torch.long)
        for mine, theirs in zip(self._buffers(), other._buffers(), strict=True):
            mine[index] = theirs
        self.optimizer.steps[rows] = other.optimizer.steps

    def paste_grads(self, rows: Sequence[int], other: Fleet) -> None:
        """Takes the gradients of `other`'s models as those of the models in `rows`."""
        self.grads[torch.as_tensor(rows, dtype=torch.long)] = other.grads

    def _buffers(self) -> tuple[Tensor, ...]:
        return self.weights, self.grads, self.optimizer.mean, self.optimizer.square

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, shape (n, …), of every parameter."""
        return self._views(self.weights)

    # -- the models ----------------------------------------------------------------------------------

    def evaluate(self, batch: Tensor) -> FloatArray:
        """Mean loss of each model on its own batch, shape (n, …), as its family defines both; float64, shape (n,)."""
        with torch.no_grad():
            losses = [self.shape.losses(group.parameters, batch[group.rows]) for group in self._groups]
        return torch.cat(losses).double().numpy()

    def backward(self, batch: Tensor) -> FloatArray:
        """Fills `grads` with each model's gradient on its own batch; returns the losses as `evaluate` does."""
        losses = []
        for group in self._groups:
            each = self.shape.losses(group.parameters, batch[group.rows])
            new = torch.autograd.grad(each.sum(), list(group.parameters.values()))
            for mine, gradient in zip(group.gradients.values(), new, strict=True):
                mine.copy_(gradient)
            losses.append(each.detach())
        return torch.cat(losses).double().numpy()

    def grad_norms(self) -> FloatArray:
        """L2 norm of each model's gradient, shape (n,)."""
        return torch.linalg.vector_norm(self.grads, dim=1).double().numpy()

    # -- the optimizer -------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        lr: FloatArray,
        beta1: FloatArray,
        beta2: FloatArray,
        *,
        weight_decay: FloatArray | float = 0.0,
        clip: FloatArray | None = None,
        eps: float = 1e-8,
    ) -> None:
        """One AdamW update of every model, as `torch.optim.AdamW` defines it (Loshchilov & Hutter 2017, algorithm 2).

        Args:
            lr: learning rates, shape (n,).
            beta1: decay of the first moment, shape (n,).
            beta2: decay of the second moment, shape (n,).
            weight_decay: decoupled decay, multiplied by `lr`.
            clip: largest gradient norm, shape (n,), `inf` for none; as `torch.nn.utils.clip_grad_norm_`.
            eps: added to the root of the second moment.
        """
        state, scratch = self.optimizer, self._scratch
        if clip is not None and np.isfinite(clip).any():
            self.grads.mul_(_column(np.minimum(1.0, clip / (self.grad_norms() + 1e-6))))
        state.steps += 1
        state.mean.lerp_(self.grads, _column(1.0 - beta1))
        torch.mul(self.grads, self.grads, out=scratch)
        state.square.lerp_(scratch, _column(1.0 - beta2))
        torch.mul(state.square, _column(1.0 / (1.0 - beta2**state.steps)), out=scratch)
        scratch.sqrt_().add_(eps)
        torch.div(state.mean, scratch, out=scratch)
        scratch.mul_(_column(lr / (1.0 - beta1**state.steps)))
        if np.any(weight_decay):
            self.weights.mul_(_column(1.0 - lr * weight_decay))
        self.weights.sub_(scratch)


def _column(values: FloatArray) -> Tensor:
    """(n,) float64 → (n, 1) float32."""
    return torch.from_numpy(np.asarray(values, dtype=np.float32))[:, None]
