"""Measures gradients, second moments and updates on a fixed sample, in one host transfer per decision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

ENTROPY_BINS = 32
"""Bins of width 1 in log2|g/rms(g)|, covering [-24, 8); what falls outside goes to the end bins."""
_LOWEST_BIN = -24.0
_SAMPLE = 4_096


def gradient_entropy(gradient: torch.Tensor) -> torch.Tensor:
    """Normalised entropy of a gradient's magnitudes on a logarithmic scale.

    Args:
        gradient: any shape, floating point.

    Returns:
        0-d tensor in [0, 1]: −Σ p log p / log(bins) over a histogram of log2|g/rms(g)|. It does not change
        when the gradient is multiplied by a constant. A gradient of zeros alone has entropy 0, a non-finite one NaN.
    """
    g = gradient.detach().float().reshape(-1)
    rms = g.square().mean().sqrt()
    magnitude = torch.log2(g.abs() / rms)
    # An exact zero (−inf) falls into the lowest bin. NaN (0/0) stands outside every bin and empties the histogram.
    bounded = magnitude.clamp_(_LOWEST_BIN, _LOWEST_BIN + ENTROPY_BINS)
    share = torch.histc(bounded, ENTROPY_BINS, _LOWEST_BIN, _LOWEST_BIN + ENTROPY_BINS) / bounded.numel()
    entropy = -torch.special.xlogy(share, share).sum() / math.log(ENTROPY_BINS)
    return torch.where(rms.isfinite(), entropy, torch.nan)


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
        self._gradient: torch.Tensor | None = None
        self._update: torch.Tensor | None = None

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
        names: list[str] = []
        values: list[torch.Tensor] = []

        def put(name: str, value: torch.Tensor | float | None) -> None:
            if value is not None:
                names.append(name)
                values.append(torch.as_tensor(value, dtype=torch.float32).detach())

        put("loss", loss)
        put("grad_norm", grad_norm if grad_norm is not None else self._grad_norm())
        gradient = self._sampled_gradient()
        if gradient is not None:
            put("grad_entropy", gradient_entropy(gradient))
            if self._gradient is not None:
                put("grad_cosine", torch.nn.functional.cosine_similarity(gradient, self._gradient, dim=0))
            put("surprise", self._surprise(gradient))
        if self._update is not None:
            names += ["update_ratio", "weight_rms"]
            values += list(self._update)
        measured = dict(zip(names, _to_host(values)))
        seen = [measured[k] for k in ("loss", "grad_norm") if k in measured]
        if seen:
            measured["nonfinite"] = float(not all(math.isfinite(v) for v in seen))
        if gradient is not None and not measured.get("nonfinite") and math.isfinite(measured["grad_entropy"]):
            self._gradient = gradient  # a poisoned gradient never becomes the reference
        return {k: v if math.isfinite(v) else math.nan for k, v in measured.items()}

    def before_step(self) -> None:
        """Notes the sampled weights, so that `after_step` can tell how far they moved."""
        self._lay_out()
        self._before = self._matrices()

    def after_step(self) -> None:
        """Measures the update that was executed since `before_step`."""
        if self._before is None:
            return
        after = self._matrices()
        assert after is not None
        moved, size = (after - self._before).square().mean(), self._before.square().mean()
        # A matrix that starts at zero (LoRA's B) has no relative size yet: NaN rather than infinity.
        ratio = torch.where(size > 0, (moved / size).sqrt(), torch.nan)
        self._update = torch.stack([ratio, size.sqrt()])
        self._before = None

    def _matrices(self) -> torch.Tensor | None:
        if not self._sampled:
            return None
        return _gather([p for p, _ in self._sampled], self._strides, self._weight_views)

    def _grad_norm(self) -> torch.Tensor | None:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if not gradients:
            return None
        norms = torch._foreach_norm([g.coalesce().values() if g.is_sparse else g for g in gradients])
        return torch.linalg.vector_norm(torch.stack([n.float().to(norms[0].device) for n in norms]))

    def _sampled_gradient(self) -> torch.Tensor | None:
        """The gradient on the sample; zeros where a tensor took no part in this step."""
        gradients = [p.grad for p, _ in self._sampled]
        if all(g is None for g in gradients):
            return None
        dense = [torch.zeros_like(p) if g is None else g.to_dense() for g, (p, _) in zip(gradients, self._sampled)]
        return _gather(dense, self._strides)

    def _surprise(self, gradient: torch.Tensor) -> torch.Tensor | None:
        """RMS_t of Wortsman et al. (2304.13013, §3.4) with the bias-corrected v that this step is about to use."""
        states = [self.optimizer.state.get(p, {}) for p, _ in self._sampled]
        known = [i for i, (p, group) in enumerate(self._sampled) if _has_second_moment(states[i], p, group)]
        if not known:
            return None
        if len(known) < len(states):  # a tensor that has taken part in no step has no v
            parts = gradient.split([-(-p.numel() // stride) for (p, _), stride in zip(self._sampled, self._strides)])
            gradient = torch.cat([parts[i] for i in known])
        group = self._sampled[known[0]][1]
        beta2 = float(group["betas"][1])
        v = _gather([states[i]["exp_avg_sq"] for i in known], [self._strides[i] for i in known], self._moment_views)
        squared = gradient.square()
        v = v.mul_(beta2).add_(squared, alpha=1.0 - beta2).div_(1.0 - beta2 ** (states[known[0]]["step"] + 1))
        return (squared / v.clamp_min_(float(group.get("eps", 1e-8)) ** 2)).mean().sqrt()

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
        self._before = self._gradient = self._update = None

    def state_dict(self) -> dict[str, Any]:
        """The reference gradient and the last update: what the next measurement compares with."""
        return {"gradient": self._gradient, "update": self._update}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`, after the optimizer's own state has been loaded."""
        self._lay_out()
        device = self._sampled[0][0].device if self._sampled else None
        self._gradient, self._update = (
            None if t is None else t.to(device) for t in (state["gradient"], state["update"])
        )


def _has_second_moment(state: Mapping[str, Any], parameter: torch.Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the optimizer keeps Adam's v of this parameter, element by element."""
    v = state.get("exp_avg_sq")
    return v is not None and v.shape == parameter.shape and "step" in state and "betas" in group


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
        chosen = [t.reshape(-1)[::stride] for t, stride in zip(tensors, strides)]
        if views is not None and all(t.is_contiguous() for t in tensors):
            views[:] = list(zip(pointers, chosen))
    return torch.cat(chosen).float()


def _to_host(values: list[torch.Tensor]) -> list[float]:
    """All values in one transfer."""
    if not values:
        return []
    device = values[-1].device
    return torch.stack([v.to(device) for v in values]).tolist()
