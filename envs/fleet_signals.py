"""The probe's signals for a whole fleet at once: the same definitions as `lbw_rl.probe`, one row per model."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lbw_rl.entropy import ENTROPY_BINS
from lbw_rl.envs.fleet import Fleet, FloatArray
from lbw_rl.probe import MEAN_WEIGHT

_LOWEST_BIN = -24.0
_STRIDE = 5  # odd, so that it is coprime to every even row length and favours no column


class FleetProbe:
    """Measures the gradients, moments and updates of a fleet on a fixed strided sample.

    Args:
        fleet: whose buffers are read; nothing is ever written.
        stride: step between sampled elements; 1 reads all of them.
    """

    def __init__(self, fleet: Fleet, stride: int = _STRIDE) -> None:
        self.fleet = fleet
        self._all = slice(0, fleet.size, stride)
        self._matrices = slice(0, fleet.matrices, stride)
        self._before: Tensor | None = None
        self._gradient = torch.full((fleet.n, len(range(fleet.size)[self._all])), torch.nan)
        self._mean = torch.full_like(self._gradient, torch.nan)
        self._update = np.full((2, fleet.n), np.nan)

    def reset(self, rows: Sequence[int]) -> None:
        """Forgets the last gradient and the last update of the models in `rows`."""
        index = torch.as_tensor(rows, dtype=torch.long)
        self._gradient[index] = self._mean[index] = torch.nan
        self._update[:, rows] = np.nan

    def take(self, rows: Sequence[int], fleet: Fleet) -> FleetProbe:
        """What is known of the models in `rows`, of which `fleet` holds copies."""
        part = copy.copy(self)
        index = torch.as_tensor(rows, dtype=torch.long)
        part.fleet = fleet
        part._gradient, part._mean, part._update = self._gradient[index], self._mean[index], self._update[:, rows]
        return part

    def before_step(self) -> None:
        """Notes the weights, so that `after_step` can tell how far they moved."""
        self._before = self.fleet.weights.detach()[:, self._matrices].clone()

    def after_step(self) -> None:
        """Measures the update that was executed since `before_step`."""
        assert self._before is not None, "after_step without before_step"
        moved = self.fleet.weights.detach()[:, self._matrices] - self._before
        size = self._before.square().mean(1)
        ratio = (moved.square().mean(1) / size).sqrt()
        self._update[0] = torch.where(
            ratio > 0, ratio, torch.from_numpy(self._update[0])
        )  # the last one that was executed
        self._update[1] = size.sqrt()
        self._before = None

    def measure(
        self, losses: FloatArray, beta2: FloatArray, rows: Sequence[int] | None = None, eps: float = 1e-8
    ) -> dict[str, FloatArray]:
        """The signals of the step at hand and of the update before it.

        Args:
            losses: training losses of this step, shape (n,).
            beta2: decay of the second moment, shape (n,).
            rows: measure these models alone; the others are NaN.
            eps: AdamW's epsilon.

        Returns:
            signal name → shape (n,), NaN where there is nothing to measure.
        """
        chosen = np.arange(self.fleet.n) if rows is None else np.asarray(rows)
        index = slice(None) if rows is None else torch.from_numpy(chosen)
        gradient = self.fleet.grads[index, self._all].contiguous()
        norms = torch.linalg.vector_norm(self.fleet.grads[index], dim=1).double().numpy()
        nonfinite = ~(np.isfinite(losses[chosen]) & np.isfinite(norms))
        cosine = torch.nn.functional.cosine_similarity(gradient, self._gradient[index], dim=1)
        part = {
            "loss": losses[chosen],
            "grad_norm": norms,
            "grad_entropy": gradient_entropies(gradient).double().numpy(),
            "grad_entropy_element": element_entropies(gradient).double().numpy(),
            "grad_entropy_direction": direction_entropies(gradient, self._mean[index]).double().numpy(),
            "grad_cosine": cosine.double().numpy(),
            "surprise": self._surprise(gradient, beta2[chosen], chosen, eps),
            "update_ratio": self._update[0, chosen],
            "weight_rms": self._update[1, chosen],
        }
        poisoned = torch.from_numpy(nonfinite)[:, None]
        # A poisoned gradient never becomes the reference.
        self._gradient[index] = torch.where(poisoned, self._gradient[index], gradient)
        known = self._mean[index]
        moved = known + MEAN_WEIGHT * (gradient - known)
        moved = torch.where(moved.isfinite().all(1, keepdim=True), moved, gradient)  # unknown before, or an overflow
        self._mean[index] = torch.where(poisoned, known, moved)
        part = {k: np.where(np.isfinite(v), v, np.nan) for k, v in part.items()}
        measured = {k: np.full(self.fleet.n, np.nan) for k in (*part, "nonfinite")}
        for name, values in (part | {"nonfinite": nonfinite.astype(np.float64)}).items():
            measured[name][chosen] = values
        return measured

    def _surprise(self, gradient: Tensor, beta2: FloatArray, rows: NDArray[np.int64], eps: float) -> FloatArray:
        """RMS_t of Wortsman et al. (2304.13013, §3.4) with the bias-corrected v that this step is about to use."""
        steps = self.fleet.optimizer.steps[rows]
        squared = gradient.square()
        decay = torch.from_numpy(beta2.astype(np.float32))[:, None]
        v = torch.lerp(squared, self.fleet.optimizer.square[torch.from_numpy(rows), self._all], decay)
        v /= torch.from_numpy((1.0 - beta2 ** (steps + 1)).astype(np.float32))[:, None]
        surprise = (squared / v.clamp_min_(eps**2)).mean(1).sqrt().double().numpy()
        return np.where(steps > 0, surprise, np.nan)  # before the first step there is no v


def gradient_entropies(gradients: Tensor) -> Tensor:
    """`lbw_rl.entropy.histogram_entropy` of each row.

    Args:
        gradients: shape (n, elements).

    Returns:
        Shape (n,), each in [0, 1].
    """
    n, elements = gradients.shape
    magnitude = torch.log2(gradients.abs() / gradients.square().mean(1, keepdim=True).sqrt())
    index = (magnitude.nan_to_num(nan=0.0) - _LOWEST_BIN).clamp_(0, ENTROPY_BINS - 1).long()
    index += torch.arange(n)[:, None] * ENTROPY_BINS
    share = torch.bincount(index.view(-1), minlength=n * ENTROPY_BINS).view(n, -1).float() / elements
    return -torch.special.xlogy(share, share).sum(1) / math.log(ENTROPY_BINS)


def element_entropies(gradients: Tensor) -> Tensor:
    """`lbw_rl.entropy.element_entropy` of each row; NaN for zeros alone.

    Args:
        gradients: shape (n, elements).

    Returns:
        Shape (n,), each in [0, 1].
    """
    energy = (gradients / gradients.abs().amax(1, keepdim=True)).square()
    share = energy / energy.sum(1, keepdim=True)
    return (-torch.special.xlogy(share, share).sum(1) / math.log(gradients.shape[1])).clamp(0.0, 1.0)


def direction_entropies(gradients: Tensor, means: Tensor) -> Tensor:
    """`lbw_rl.entropy.direction_entropy` of each row; NaN where a mean is not known.

    Args:
        gradients, means: shape (n, elements).

    Returns:
        Shape (n,), each in [0, 1].
    """
    energy = (gradients / gradients.abs().amax(1, keepdim=True)).square()
    q = (energy * (gradients.signbit() == means.signbit())).sum(1) / energy.sum(1)
    entropy = -(torch.special.xlogy(q, q) + torch.special.xlogy(1 - q, 1 - q)) / math.log(2)
    return torch.where(means.isnan().any(1), torch.nan, entropy.clamp(0.0, 1.0))
