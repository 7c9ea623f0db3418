"""Gradient clipping of a run: at a fixed norm, or by the run's own norms."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch

from lbw_rl.envs.specs import OptimizerSpec
from lbw_rl.extras import require


class Clipping(Protocol):
    """Scales gradients in place between the backward pass and the optimizer's step."""

    def __call__(self) -> torch.Tensor:
        """Clips, and returns the global L2 norm before: a 0-d tensor."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that the next clipping depends on besides the gradients."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        ...


def build_clipping(spec: OptimizerSpec, model: torch.nn.Module, total_steps: int) -> Clipping | None:
    """The clipping that a recipe asks for, None where it leaves gradients alone.

    Args:
        spec: `adaptive_clip` and `grad_clip` count. `zclip` with a `grad_clip` holds to both, as its package does with
            `max_grad_norm`; without one it is the adaptive rule alone.
        model: its parameters with `requires_grad` are clipped.
        total_steps: planned optimizer steps.

    Raises:
        ModuleNotFoundError: `zclip` without its package; one line that names the extra.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if spec.adaptive_clip == "zclip":
        return ZClip(model, spec.grad_clip)
    if spec.adaptive_clip == "adagc":
        return AdaGC(trained, warmup_steps=adagc_warmup(total_steps))
    return None if spec.grad_clip is None else GlobalNorm(trained, spec.grad_clip)


class GlobalNorm:
    """torch's `clip_grad_norm_` at a fixed limit."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], limit: float) -> None:
        self._parameters, self._limit = list(parameters), limit

    def __call__(self) -> torch.Tensor:
        """Clips, and returns the norm before."""
        return torch.nn.utils.clip_grad_norm_(self._parameters, self._limit)

    def state_dict(self) -> dict[str, Any]:
        """Empty: nothing is remembered."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


class ZClip:
    """The package `zclip` (Kumar et al. 2504.02507) at its defaults, with a state that can be checkpointed.

    An exponential mean μ and variance σ² of the gradient norm (decay 0.97, from the first 25 steps); a norm z > 2.5
    deviations above μ is scaled to μ + 2.5²σ/z. The value that it is clipped to enters the statistics.

    Known of the package and left as it is: a norm that is not finite enters them too. One NaN makes both NaN for the rest of
    the run, in which nothing is clipped any more. It reads the norm on the host at every step. bf16 norms are bf16.

    Args:
        model: whose gradients are clipped.
        limit: largest norm besides, in warmup too; None for none.
    """

    def __init__(self, model: torch.nn.Module, limit: float | None) -> None:
        require("zclip")
        self._model = model
        self._zclip = importlib.import_module("zclip").ZClip(
            alpha=0.97, z_thresh=2.5, warmup_steps=25, max_grad_norm=limit
        )

    def __call__(self) -> torch.Tensor:
        """Clips, and returns the norm before."""
        norm = self._zclip.step(self._model)
        return torch.tensor(norm, device=next(self._model.parameters()).device)

    def state_dict(self) -> dict[str, Any]:
        """Mean and variance, or the norms that they will be taken from."""
        z = self._zclip
        return {"initialized": z.initialized, "mean": z.mean, "var": z.var, "buffer": list(z.buffer)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        z = self._zclip
        z.initialized, z.mean, z.var, z.buffer = (state[k] for k in ("initialized", "mean", "var", "buffer"))
        z.buffer = list(z.buffer)


def adagc_warmup(total_steps: int) -> int:
    """AdaGC's warmup: 100 steps as in the paper, whose runs are long; of a short run a tenth."""
    return min(100, max(1, total_steps // 10))


class AdaGC:
    """Adaptive gradient clipping, tensor by tensor (Wang et al. 2502.11034, algorithm 1).

    With g the gradient of one tensor, ĝ the clipped one and γ that tensor's threshold:

        warmup     ĝ = g · min(λ_abs / ‖all gradients‖, 1)     γ ← min(γ, ‖ĝ‖)
        after it   ĝ = g · min(λ_rel · γ / ‖g‖, 1)             γ ← β·γ + (1 − β)·‖ĝ‖

    The paper's constants: λ_rel 1.05, λ_abs 1.0, β 0.98. Nothing is read on the host.

    Finiteness before state, where the paper is silent: a norm that is not finite enters no γ, and its gradients stay as they
    are, for others to see. Nor does a zero norm: γ = 0 would withhold that tensor's gradient for ever, and LoRA's A starts
    with one. A tensor without any norm yet is not clipped.

    Args:
        parameters: whose gradients are clipped.
        warmup_steps: steps of global clipping.
        relative: λ_rel.
        absolute: λ_abs.
        decay: β.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        *,
        warmup_steps: int,
        relative: float = 1.05,
        absolute: float = 1.0,
        decay: float = 0.98,
    ) -> None:
        self._parameters = list(parameters)
        self._warmup_steps, self._relative, self._absolute, self._decay = warmup_steps, relative, absolute, decay
        self.step = 0
        device = self._parameters[0].device if self._parameters else None
        self.thresholds = torch.full((len(self._parameters),), math.inf, device=device)
        """γ of each tensor, shape (tensors,); infinite before its first norm."""

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """Clips, and returns the global norm before."""
        having = [i for i, p in enumerate(self._parameters) if p.grad is not None]
        gradients = [g for p in self._parameters if (g := p.grad) is not None]
        warming_up = self.step < self._warmup_steps
        self.step += 1
        if not gradients:
            return torch.zeros((), device=self.thresholds.device)
        norms = torch.stack(torch._foreach_norm(gradients, 2, torch.float32))
        total = torch.linalg.vector_norm(norms)
        index = torch.tensor(having, device=norms.device)
        before = self.thresholds[index]
        if warming_up:
            healthy = total.isfinite() & (norms > 0)
            factors = torch.where(healthy, (self._absolute / total).clamp(max=1.0), 1.0)
            after = torch.minimum(before, norms * factors)
        else:
            healthy = norms.isfinite() & (norms > 0)
            factors = torch.where(healthy, (self._relative * before / norms).clamp(max=1.0), 1.0)
            clipped = norms * factors
            after = torch.where(before.isinf(), clipped, self._decay * before + (1.0 - self._decay) * clipped)
        self.thresholds[index] = torch.where(healthy, after, before)
        torch._foreach_mul_(gradients, list(factors.unbind()))
        return total

    def state_dict(self) -> dict[str, Any]:
        """Steps done and thresholds."""
        return {"step": self.step, "thresholds": self.thresholds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self.step = int(state["step"])
        self.thresholds.copy_(state["thresholds"])
