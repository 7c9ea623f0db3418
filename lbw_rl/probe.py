"""Measures gradients, second moments and updates on a fixed sample, in one host transfer per decision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Vector = NDArray[np.float32]

ENTROPY_BINS = 32
"""Bins of width 1 in log2|g/rms(g)|, covering [-24, 8); what falls outside goes to the end bins."""
_LOWEST_BIN = -24
_SAMPLE = 4_096


def gradient_entropy(gradient: torch.Tensor) -> torch.Tensor:
    """Normalised entropy of a gradient's magnitudes on a logarithmic scale.

    Args:
        gradient: any shape, floating point.

    Returns:
        0-d tensor in [0, 1]: −Σ p log p / log(bins) over a histogram of log2|g/rms(g)|. It does not change
        when the gradient is multiplied by a constant. A gradient of zeros alone has entropy 0, a non-finite one NaN.
    """
    return torch.tensor(_entropy(gradient.detach().float().reshape(-1).cpu().numpy()))


def _entropy(gradient: Vector) -> float:
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


class Probe:
    """Reads an optimizer's parameters just before and just after its step.

    The sample is fixed: every `stride`-th element of each trainable weight matrix (of every tensor, where there is
    no matrix), about 4,000 in all, shared out in proportion to size. On it the update-to-weight ratio has a
    standard error of about 1 %.

    Args:
        optimizer: whose parameters are read; nothing is ever written.
        sample: elements sampled over all matrices.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, sample: int = _SAMPLE) -> None:
        self.optimizer = optimizer
        self.sample = sample
        self._parameters: list[torch.nn.Parameter] = []
        self._sampled: list[tuple[torch.nn.Parameter, dict[str, Any]]] = []
        self._strides: list[int] = []
        self._layout_key: tuple[int, ...] = ()
        self._weight_views: list[tuple[int, torch.Tensor]] = []
        self._moment_views: list[tuple[int, torch.Tensor]] = []
        self._before: torch.Tensor | None = None
        self._after: torch.Tensor | None = None
        self._gradient: torch.Tensor | None = None
        self._known: list[int] = []

    def measure(self, loss: torch.Tensor | float | None, grad_norm: torch.Tensor | float | None) -> dict[str, float]:
        """The signals of the step at hand and of the update before it.

        Args:
            loss: mean training loss, a 0-d tensor or a number; None if not observed.
            grad_norm: global norm before clipping where the caller knows it; else it is computed here, from the
                gradients as they are.

        Returns:
            signal name → value, NaN where there is nothing to measure.
        """
        self._lay_out()
        if grad_norm is None:
            grad_norm = self._grad_norm()
        gradient = self._sampled_gradient()
        moments = None if gradient is None else self._second_moments()
        scalars = {"loss": loss, "grad_norm": grad_norm}
        samples = {"gradient": gradient, "before": self._before, "after": self._after, "v": moments}
        host = _to_host({k: v for k, v in {**scalars, **samples}.items() if v is not None})
        measured = {k: float(host[k][0]) for k in scalars if k in host}
        with np.errstate(all="ignore"):  # what is not finite becomes NaN below
            if gradient is not None:
                measured |= self._gradient_signals(host)
            if self._after is not None:
                measured |= _update_signals(host["before"], host["after"])
        seen = [measured[k] for k in scalars if k in measured]
        if seen:
            measured["nonfinite"] = float(not all(math.isfinite(v) for v in seen))
        if gradient is not None and not measured.get("nonfinite") and math.isfinite(measured["grad_entropy"]):
            self._gradient = torch.from_numpy(host["gradient"])  # a poisoned gradient never becomes the reference
        return {k: v if math.isfinite(v) else math.nan for k, v in measured.items()}

    def before_step(self) -> None:
        """Notes the sampled weights, so that the next measurement can tell how far they moved."""
        self._lay_out()
        self._before, self._after = self._matrices(), None

    def after_step(self) -> None:
        """Notes where the step that `before_step` announced has taken the sampled weights."""
        if self._before is not None and self._after is None:
            self._after = self._matrices()

    def _matrices(self) -> torch.Tensor | None:
        if not self._sampled:
            return None
        return _gather([p for p, _ in self._sampled], self._strides, self._weight_views)

    def _grad_norm(self) -> torch.Tensor | None:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if not gradients:
            return None
        norms = list(torch._foreach_norm([g.coalesce().values() if g.is_sparse else g for g in gradients]))
        if len({(n.device, n.dtype) for n in norms}) > 1:
            norms = [n.float().to(norms[0].device) for n in norms]
        return torch.linalg.vector_norm(torch.stack(norms).float())

    def _sampled_gradient(self) -> torch.Tensor | None:
        """The gradient on the sample; zeros where a tensor took no part in this step."""
        gradients = [p.grad for p, _ in self._sampled]
        if all(g is None for g in gradients):
            return None
        dense = [
            torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
            for g, (p, _) in zip(gradients, self._sampled)
        ]
        return _gather(dense, self._strides)

    def _gradient_signals(self, host: Mapping[str, Vector]) -> dict[str, float]:
        gradient = host["gradient"]
        signals = {"grad_entropy": _entropy(gradient)}
        if self._gradient is not None:
            reference = self._gradient.numpy()
            norms = math.sqrt(float(gradient @ gradient) * float(reference @ reference))
            signals["grad_cosine"] = float(gradient @ reference) / norms if norms > 0 else math.nan
        if "v" in host:
            signals["surprise"] = self._surprise(gradient, host["v"])
        return signals

    def _second_moments(self) -> torch.Tensor | None:
        """Adam's v on the sample, of the tensors that have one (`_known`): those that took part in a step."""
        states = [self.optimizer.state.get(p, {}) for p, _ in self._sampled]
        self._known = [i for i, (p, g) in enumerate(self._sampled) if _has_second_moment(states[i], p, g)]
        if not self._known:
            return None
        views = self._moment_views if len(self._known) == len(states) else None
        return _gather([states[i]["exp_avg_sq"] for i in self._known], [self._strides[i] for i in self._known], views)

    def _surprise(self, gradient: Vector, v: Vector) -> float:
        """RMS_t of Wortsman et al. (2304.13013, §3.4) with the bias-corrected v that this step is about to use."""
        if len(self._known) < len(self._sampled):
            ends = np.cumsum([_count(p, stride) for (p, _), stride in zip(self._sampled, self._strides)])
            parts = np.split(gradient, ends[:-1])
            gradient = np.concatenate([parts[i] for i in self._known])
        parameter, group = self._sampled[self._known[0]]
        beta2 = float(group["betas"][1])
        squared = gradient * gradient
        corrected = (beta2 * v + (1.0 - beta2) * squared) / (1.0 - beta2 ** (self._steps_taken(parameter) + 1.0))
        return math.sqrt(float((squared / np.maximum(corrected, float(group.get("eps", 1e-8)) ** 2)).mean()))

    def _steps_taken(self, parameter: torch.nn.Parameter) -> float:
        return float(self.optimizer.state[parameter]["step"])

    def _lay_out(self) -> None:
        """Chooses the sample anew when what is trained changes (`add_param_group`, a loaded state, an unfreezing)."""
        groups = self.optimizer.param_groups
        trained = sum(p.requires_grad for g in groups for p in g["params"])
        key = (*(id(g) for g in groups), *(len(g["params"]) for g in groups), trained)
        if key == self._layout_key:
            return
        present = [(p, group) for group in groups for p in group["params"] if p.numel()]
        self._parameters = [p for p, _ in present]
        present = [(p, group) for p, group in present if p.requires_grad] or present
        self._sampled = [(p, group) for p, group in present if p.ndim >= 2] or present
        total = sum(p.numel() for p, _ in self._sampled)
        self._strides = [_stride(p, self.sample, total) for p, _ in self._sampled]
        self._layout_key = key
        self._weight_views, self._moment_views = [], []
        self._before = self._after = self._gradient = None

    def state_dict(self) -> dict[str, Any]:
        """The reference gradient and the last update: what the next measurement compares with."""
        return {"gradient": self._gradient, "before": self._before, "after": self._after}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`, after the optimizer's own state has been loaded."""
        self._lay_out()
        device = self._sampled[0][0].device if self._sampled else None
        self._gradient = state["gradient"]
        self._before, self._after = (None if t is None else t.to(device) for t in (state["before"], state["after"]))


def _update_signals(before: Vector, after: Vector) -> dict[str, float]:
    moved, size = after - before, float(before @ before)
    # A matrix that starts at zero (LoRA's B) has no relative size yet: NaN rather than infinity.
    ratio = math.sqrt(float(moved @ moved) / size) if size > 0 else math.nan
    return {"update_ratio": ratio, "weight_rms": math.sqrt(size / before.size)}


def _has_second_moment(state: Mapping[str, Any], parameter: torch.Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the optimizer keeps Adam's v of this parameter, element by element."""
    v = state.get("exp_avg_sq")
    return v is not None and v.shape == parameter.shape and "step" in state and "betas" in group


def _count(parameter: torch.Tensor, stride: int) -> int:
    """Elements sampled of a tensor."""
    return -(-parameter.numel() // stride)


def _stride(parameter: torch.Tensor, sample: int, total: int) -> int:
    """Step between sampled elements; coprime to the row length, so that no column is favoured."""
    wanted = max(32, round(sample * parameter.numel() / total))
    stride = max(1, parameter.numel() // wanted)
    row = parameter.shape[-1] if parameter.ndim else 1
    while math.gcd(stride, row) > 1:
        stride -= 1
    return stride


@torch.no_grad()
def _gather(
    tensors: list[torch.Tensor], strides: list[int], views: list[tuple[int, torch.Tensor]] | None = None
) -> torch.Tensor:
    """The sampled elements of all tensors as one float32 vector (a copy).

    Args:
        tensors, strides: what to sample, and the step between elements.
        views: the strided views of an earlier call, reused while every tensor still lies where it lay.
    """
    pointers = [t.data_ptr() for t in tensors] if views is not None else []
    if views and [pointer for pointer, _ in views] == pointers:
        chosen = [view for _, view in views]
    else:
        chosen = [
            torch.as_strided(t, (_count(t, stride),), (stride,), t.storage_offset())
            if t.is_contiguous()
            else t.reshape(-1)[::stride]
            for t, stride in zip(tensors, strides)
        ]
        if views is not None and all(t.is_contiguous() for t in tensors):
            views[:] = list(zip(pointers, chosen))
    return torch.cat(chosen).float()


def _to_host(values: Mapping[str, torch.Tensor | float]) -> dict[str, Vector]:
    """Name → float32 vector on the host, all of them in one transfer."""
    tensors = [torch.as_tensor(v).detach().reshape(-1).float() for v in values.values()]
    device = tensors[-1].device if tensors else None
    packed = torch.cat([t.to(device) for t in tensors]).cpu().numpy() if tensors else np.empty(0, np.float32)
    ends = list(accumulate(t.numel() for t in tensors))
    return {name: packed[end - t.numel() : end] for name, t, end in zip(values, tensors, ends)}
