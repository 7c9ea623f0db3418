"""The noisy quadratic with a power-law spectrum, in a basis that Adam's axes do not know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lbw_rl.envs.proxy_data import BatchShape
from lbw_rl.envs.tasks import NOISE, Tasks

_BASIS = 0  # seed of the rotation, the same for every fleet


@dataclass(frozen=True, slots=True)
class QuadraticShape:
    """A quadratic bowl that all models of a fleet share (the noisy quadratic model of Zhang et al. 1907.04164, §3).

    With z = U θ Vᵀ for fixed orthogonal U and V, the loss of a batch is ½ Σ h (z − e)² + `floor`, where the i-th
    largest curvature h is proportional to i^−`power`. The displacement e of a batch of B examples is normal with
    variance `noise` / (B h): the gradient's covariance is proportional to the curvature, as at large B in deep
    networks. Held out, e is 0, so that the loss is the expected one.

    Attributes:
        rows: of θ, which stands for one weight matrix.
        columns: of θ.
        power: exponent of the spectrum.
        excess: expected loss above `floor` at the start.
        floor: loss at the minimum.
        noise: expected loss that the displacement of one example makes, ½ Σ h e².
    """

    rows: int = 32
    columns: int = 32
    power: float = 1.0
    excess: float = 3.0
    floor: float = 1.0
    noise: float = 30.0

    @property
    def name(self) -> str:
        """ "quadratic"."""
        return "quadratic"

    @property
    def tuned_lr(self) -> float:
        """Best constant-error learning rate of the default shape."""
        return 0.2

    def parameters(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """θ, a matrix."""
        yield "theta", (self.rows, self.columns)

    def draw(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """θ from normal(0, 1), so that z is as well."""
        return rng.standard_normal(self.rows * self.columns, dtype=np.float32)

    def data(self, task: Tasks, steps: int, batch: BatchShape, text: Path | None) -> tuple[Tensor, Tensor]:
        """Displacements of a single task, shape (steps, rows, columns), and the 0 of what is held out.

        A batch has as many examples as it has distinct sequences elsewhere. Where a language model would read random
        tokens, the minimum lies at a random point.
        """
        noise = task.generator(0, NOISE)
        unit = torch.from_numpy(noise.standard_normal((steps, self.rows, self.columns), dtype=np.float32))
        share = 2.0 * self.noise / (batch.distinct(task) * self.rows * self.columns)
        displacement = unit * (share / _curvature(self)).sqrt()
        random = np.where(task.has("corrupted-batches", np.arange(steps)), 1.0, task.label_noise)
        if random.any():
            replaced = torch.from_numpy(noise.random(unit.shape) < random[:, None, None])
            elsewhere = torch.from_numpy(noise.standard_normal(unit.shape, dtype=np.float32))
            displacement = torch.where(replaced, elsewhere, displacement)
        return displacement, torch.zeros(self.rows, self.columns)

    def losses(self, weights: Mapping[str, Tensor], batch: Tensor) -> Tensor:
        """Each model's loss at its own displacement, (n, rows, columns); see `Family.losses`."""
        left, right = _basis(self)
        theta = weights["theta"]
        z = torch.bmm(left.expand(len(theta), -1, -1), torch.bmm(theta, right.expand(len(theta), -1, -1)))
        return 0.5 * (_curvature(self) * (z - batch).square()).sum((1, 2)) + self.floor


@cache
def _curvature(shape: QuadraticShape) -> Tensor:
    """h, shape (rows, columns); its sum is 2·`excess`."""
    h = np.arange(1, shape.rows * shape.columns + 1) ** -float(shape.power)
    order = np.random.default_rng(_BASIS).permutation(len(h))
    return torch.from_numpy((2.0 * shape.excess * h / h.sum())[order].reshape(shape.rows, -1)).float()


@cache
def _basis(shape: QuadraticShape) -> tuple[Tensor, Tensor]:
    """U, shape (rows, rows), and Vᵀ, shape (columns, columns)."""
    rng = np.random.default_rng([_BASIS, 1])
    left, right = (np.linalg.qr(rng.standard_normal((k, k)))[0] for k in (shape.rows, shape.columns))
    return torch.from_numpy(left).float(), torch.from_numpy(right).float()
