"""Entropies of a gradient, normalised to [0, 1]: how evenly its magnitudes, energy or directions are spread.

Each estimator reads the probe's fixed sample of about 4,096 elements, so that its value does not drift with the size of
the model: the normalisation log n is that of the sample. What each of them can tell is measured in docs/entropy.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]

ENTROPY_BINS = 32
"""Bins of width 1 in log2|g/rms(g)|, covering [-24, 8); what falls outside goes to the end bins."""
_LOWEST_BIN = -24


def softmax_entropy(gradient: Vector) -> float:
    """H(softmax(|g|)) / log n: the estimator of EntroPIC's source text.

    Gradients are far below 1, so softmax sees n nearly equal numbers and this reads 0.9995 to 1 whatever the run does
    (docs/entropy.md). It is not invariant to scale: the gradient must be unscaled.

    Args:
        gradient: shape (n,).

    Returns:
        In [0, 1]; NaN for a gradient that is not finite, 0 for a single element.
    """
    magnitude = np.abs(gradient)
    peak = float(magnitude.max())
    if not math.isfinite(peak):
        return math.nan
    if magnitude.size == 1:
        return 0.0
    weights = np.exp(magnitude - peak)
    total = float(weights.sum(dtype=np.float64))
    # −Σ p log p with p = w/Σw and log w = |g| − max|g|.
    entropy = math.log(total) - float(np.dot(weights, magnitude - peak)) / total
    return _unit(entropy / math.log(magnitude.size))


def histogram_entropy(gradient: Vector) -> float:
    """−Σ p log p / log(bins) over a histogram of log2|g/rms(g)|: how widely the magnitudes are spread over octaves.

    Args:
        gradient: shape (n,).

    Returns:
        In [0, 1], the same for every multiple of the gradient; 0 for zeros alone, NaN for one that is not finite.
    """
    magnitude = np.abs(gradient)
    peak = magnitude.max()
    if peak == 0.0 or not math.isfinite(peak):
        return 0.0 if peak == 0.0 else math.nan
    magnitude /= peak  # before squaring: tiny gradients must not underflow
    magnitude /= math.sqrt(np.dot(magnitude, magnitude) / magnitude.size)
    # floor(log2 x) is the exponent field of a float32; zero has the lowest one and falls into the lowest bin.
    octave = (magnitude.view(np.int32) >> 23) - 127
    bins = np.minimum(np.maximum(octave - _LOWEST_BIN, 0), ENTROPY_BINS - 1)
    counts = np.bincount(bins, minlength=ENTROPY_BINS)
    share = counts[counts > 0] / octave.size
    return -float(share @ np.log(share)) / math.log(ENTROPY_BINS) + 0.0


def element_entropy(gradient: Vector) -> float:
    """−Σ p log p / log n with p = g²/Σg²: over how many elements the gradient's energy is spread.

    1 where all have the same magnitude, 0 where one element has all of the energy. exp(H)/n is the participation ratio.

    Args:
        gradient: shape (n,).

    Returns:
        In [0, 1], the same for every multiple of the gradient; 0 for zeros alone, NaN for one that is not finite.
    """
    peak = float(np.abs(gradient).max())
    if peak == 0.0 or not math.isfinite(peak):
        return 0.0 if peak == 0.0 else math.nan
    scaled = gradient / peak  # before squaring: tiny gradients must not underflow
    return _share_entropy(scaled * scaled)


def tensor_entropy(gradient: Vector, starts: NDArray[np.intp], weights: Vector) -> float:
    """−Σ p log p / log T with p the T tensors' shares of the gradient's energy.

    Args:
        gradient: shape (n,), tensor after tensor.
        starts: where each tensor begins, shape (T,).
        weights: elements that each sampled one stands for, shape (T,).

    Returns:
        In [0, 1], the same for every multiple of the gradient; 0 for zeros alone, NaN for one that is not finite and
        where there is one tensor only.
    """
    peak = float(np.abs(gradient).max())
    if starts.size < 2 or not math.isfinite(peak):
        return math.nan
    if peak == 0.0:
        return 0.0
    scaled = gradient / peak
    return _share_entropy(np.add.reduceat(scaled * scaled, starts) * weights)


def direction_entropy(gradient: Vector, mean: Vector) -> float:
    """Binary entropy, in bits, of q: the share of the gradient's energy in elements that keep the sign of its recent mean.

    1 where the direction of each element is a coin toss (noise rules, or the rate is as large as the curvature allows),
    0 where the gradient goes on as before (or turns round as a whole): the run could take larger steps.

    Args:
        gradient: shape (n,).
        mean: a mean of the gradients before it, same shape; its size does not matter.

    Returns:
        In [0, 1], the same for every multiple of either; NaN where one of them is not finite or is zeros alone.
    """
    peak = float(np.abs(gradient).max())
    if not (0.0 < peak < math.inf) or not np.isfinite(mean).all() or not mean.any():
        return math.nan
    energy = np.square(gradient / peak)
    q = float(energy[np.signbit(gradient) == np.signbit(mean)].sum(dtype=np.float64)) / float(
        energy.sum(dtype=np.float64)
    )
    if not 0.0 < q < 1.0:
        return 0.0
    return _unit(-(q * math.log2(q) + (1.0 - q) * math.log2(1.0 - q)))


def _share_entropy(energy: Vector) -> float:
    """−Σ p log p / log n of the shares of non-negative numbers of which one at least is not small."""
    if energy.size == 1:
        return 0.0
    total = float(energy.sum(dtype=np.float64))
    # The smallest float32 stands in for 0: x log x is 0 there to every digit, and the logarithm is finite.
    logarithm = np.log(np.maximum(energy, np.finfo(np.float32).tiny))
    entropy = math.log(total) - float(np.dot(energy, logarithm)) / total
    return _unit(entropy / math.log(energy.size))


def _unit(value: float) -> float:
    """Rounding may pass the ends by an ulp."""
    return min(1.0, max(0.0, value))


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the estimators read.

    Attributes:
        gradient: the sample of the gradient at hand, shape (n,).
        mean: that of the recent mean gradient, None before there is one.
        starts: where each tensor's elements begin, shape (T,).
        weights: how many elements each sampled one stands for, shape (T,).
    """

    gradient: Vector
    mean: Vector | None
    starts: NDArray[np.intp]
    weights: Vector

    def part(self, begin: int, end: int) -> Sampled:
        """Elements `begin` to `end` alone, as one tensor."""
        mean = None if self.mean is None else self.mean[begin:end]
        return Sampled(self.gradient[begin:end], mean, np.zeros(1, np.intp), np.ones(1, np.float32))


ESTIMATORS: dict[str, tuple[str, Callable[[Sampled], float]]] = {
    "histogram": ("grad_entropy", lambda s: histogram_entropy(s.gradient)),
    "softmax": ("grad_entropy_softmax", lambda s: softmax_entropy(s.gradient)),
    "element": ("grad_entropy_element", lambda s: element_entropy(s.gradient)),
    "tensor": ("grad_entropy_tensor", lambda s: tensor_entropy(s.gradient, s.starts, s.weights)),
    "direction": (
        "grad_entropy_direction",
        lambda s: math.nan if s.mean is None else direction_entropy(s.gradient, s.mean),
    ),
}
"""Name → the signal that carries it, and the estimator."""
