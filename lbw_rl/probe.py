"""Measures gradients, second moments and updates on a fixed sample, in one host transfer per decision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lbw_rl.entropy import ESTIMATORS, Sampled
from lbw_rl.sample import SAMPLE_SIZE, Part, Sample, is_sharded, own_shard

Vector = NDArray[np.float32]

MEAN_WEIGHT = 0.1
"""Of the newest gradient in the mean that `grad_entropy_direction` compares with: about ten decisions, as Adam's first moment."""

SCALARS = (
    "loss", "step_loss", "norm", "shard_norm", "found_inf", "loss_scale", "learning_rate", "steps_taken",
)  # fmt: skip
"""What a rank reports besides its part of the sample; NaN where it has nothing to report, see `Packed.present`."""
SEGMENTS = ("gradient", "before", "after", "v")
"""The sampled vectors, in order."""


@dataclass(frozen=True, slots=True)
class Packed:
    """One rank's measurements, on the device of its parameters.

    Attributes:
        values: float32, the present scalars and then the present segments.
        present: their names, in order.
        segment: elements of one segment.
        beta2, eps: of the sampled parameters' optimizer, for `surprise`.
    """

    values: torch.Tensor
    present: tuple[str, ...]
    segment: int
    beta2: float
    eps: float

    def unpack(self, host: Vector) -> dict[str, Vector]:
        """Name → its part of `values`, once they have come to the host."""
        lengths = [self.segment if name in SEGMENTS else 1 for name in self.present]
        ends = list(accumulate(lengths))
        return {name: host[end - length : end] for name, length, end in zip(self.present, lengths, ends)}


class Probe:
    """Reads an optimizer's parameters just before and just after its step; nothing is ever written.

    On the sample (see `Sample`) the update-to-weight ratio has a standard error of about 1 %.

    Args:
        optimizer: whose parameters are read.
        sample: elements sampled over all matrices.
        answers: whether this process answers for what every rank holds alike.
        group_entropy: name of the estimator that is also taken of each parameter group alone; None for none.

    Raises:
        ValueError: an unknown estimator.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        sample: int = SAMPLE_SIZE,
        *,
        answers: bool = True,
        group_entropy: str | None = None,
    ) -> None:
        if group_entropy not in (None, *ESTIMATORS):
            raise ValueError(f"group_entropy: {group_entropy!r} is unknown; accepted: {', '.join(ESTIMATORS)}, or None")
        self.optimizer = optimizer
        self._size, self._answers, self._group_entropy = sample, answers, group_entropy
        self._layout_key: tuple[tuple[int, ...], ...] = ()
        self._weight_views: list[tuple[int, torch.Tensor]] = []
        self._moment_views: list[tuple[int, torch.Tensor]] = []
        self._before: torch.Tensor | None = None
        self._after: torch.Tensor | None = None
        self._gradient: Vector | None = None
        self._mean: Vector | None = None
        self._sample = Sample(optimizer.param_groups, sample, answers=answers)
        self._lay_out()

    @property
    def sample_size(self) -> int:
        """Elements of the sample."""
        self._lay_out()
        return self._sample.size

    @property
    def sampled_groups(self) -> list[tuple[dict[str, Any], int]]:
        """The sampled parameter groups in order, each with its elements of the sample."""
        return self._sample.groups

    @property
    def reference(self) -> Vector | None:
        """The gradient that was remembered last, on the sample."""
        return self._gradient

    @property
    def device(self) -> torch.device:
        """Where the sampled parameters are."""
        return self._sample.device

    # --- on the device -----------------------------------------------------------------------------------

    def pack(
        self,
        loss: torch.Tensor | None,
        step_loss: torch.Tensor | None,
        grad_norm: torch.Tensor | float | None,
        loss_scale: torch.Tensor | float | None = None,
    ) -> Packed:
        """Gathers what the signals are made of, without a host transfer.

        Args:
            loss: mean training loss of the window, 0-d.
            step_loss: mean training loss of the step at hand, 0-d.
            grad_norm: global norm before clipping where the caller knows it; else it is computed here, from the
                gradients as they are, unscaled where a `GradScaler` leaves that to a fused optimizer.
            loss_scale: the `GradScaler`'s factor.
        """
        self._lay_out()
        scale, found_inf = (getattr(self.optimizer, name, None) for name in ("grad_scale", "found_inf"))
        norm, shard_norm = (
            _split(grad_norm, self._answers) if grad_norm is not None else self._norms(scale, self._answers)
        )
        lr = self.optimizer.param_groups[0].get("lr")
        if not (isinstance(lr, torch.Tensor) and lr.device.type != "cpu"):
            lr = None  # known on the host already
        gradient = self._sampled_gradient(scale)
        moments = None if gradient is None else self._second_moments()
        steps_taken = None if moments is None else self._steps_taken()
        scalars = (loss, step_loss, norm, shard_norm, found_inf, loss_scale, lr, steps_taken)
        segments = (gradient, self._before, self._after, moments)
        return self._packed(dict(zip((*SCALARS, *SEGMENTS), (*scalars, *segments))))

    def pack_scalars(self, loss: torch.Tensor | None, grad_norm: torch.Tensor | float | None) -> Packed:
        """Loss and norm alone, as `pack` takes them; every rank answers for itself."""
        self._lay_out()
        scale = getattr(self.optimizer, "grad_scale", None)
        norm, shard_norm = _split(grad_norm, True) if grad_norm is not None else self._norms(scale, True)
        return self._packed({"loss": loss, "norm": norm, "shard_norm": shard_norm})

    def _packed(self, values_of: Mapping[str, torch.Tensor | float | None]) -> Packed:
        named = {k: v for k, v in values_of.items() if v is not None}
        tensors = [torch.as_tensor(v).detach().reshape(-1).float() for v in named.values()]
        device = self._sample.device
        values = torch.cat([t.to(device, non_blocking=True) for t in tensors]) if tensors else torch.empty(0)
        beta2, eps = self._adam()
        return Packed(values, tuple(named), self._sample.size, beta2, eps)

    @property
    def sharded(self) -> bool:
        """Whether gradients are spread over ranks."""
        return self._sample.sharded

    def before_step(self) -> None:
        """Notes the sampled weights, so that the next measurement can tell how far they moved."""
        self._lay_out()
        self._before, self._after = self._weights(), None

    def after_step(self) -> None:
        """Notes where the step that `before_step` announced has taken the sampled weights."""
        if self._before is not None and self._after is None:
            self._after = self._weights()

    def _weights(self) -> torch.Tensor | None:
        if not self._sample.parts:
            return None
        return self._sample.gather(lambda part: part.parameter, self._weight_views)

    def _norms(self, scale: torch.Tensor | None, answers: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """L2 norms of the gradients that this rank answers for: the replicated ones, and its shards."""
        gradients = [p.grad for p in self._sample.parameters if p.grad is not None]
        shared, shards = gradients if answers else [], []
        if self._sample.sharded:
            own = [(g, own_shard(g, answers=answers)) for g in gradients]
            shared = [o for g, o in own if o is not None and not is_sharded(g)]
            shards = [o for g, o in own if o is not None and is_sharded(g)]
        norm, shard_norm = _joint_norm(shared), _joint_norm(shards)
        if scale is not None:
            norm, shard_norm = (None if n is None else n / scale for n in (norm, shard_norm))
        return norm, shard_norm

    def _sampled_gradient(self, scale: torch.Tensor | None) -> torch.Tensor | None:
        """The gradient on the sample; zeros where a tensor took no part in this step."""
        if all(part.parameter.grad is None for part in self._sample.parts):
            return None
        gradient = self._sample.gather(_dense_gradient)
        return gradient if scale is None else gradient / scale

    def _second_moments(self) -> torch.Tensor | None:
        """Adam's v on the sample; −1 for the tensors that have none, not having taken part in a step."""
        state = self.optimizer.state
        moments = {id(part): _second_moment(state.get(part.parameter), part) for part in self._sample.parts}
        if all(v is None for v in moments.values()):
            return None

        def read(part: Part) -> torch.Tensor:
            v = moments[id(part)]
            return v if v is not None else torch.full_like(part.parameter, -1.0)

        return self._sample.gather(read, self._moment_views)

    def _steps_taken(self) -> torch.Tensor | float:
        states = (self.optimizer.state.get(part.parameter) for part in self._sample.parts)
        return next(s["step"] for s in states if s and "step" in s)

    def _adam(self) -> tuple[float, float]:
        group = self._sample.parts[0].group if self._sample.parts else {}
        if "betas" not in group:
            return math.nan, math.nan
        eps = group.get("eps", 1e-8)
        return float(group["betas"][1]), float(eps[0] if isinstance(eps, tuple | list) else eps)  # CAME has several

    def _lay_out(self) -> None:
        """Chooses the sample anew when what is trained changes (`add_param_group`, a loaded state, an unfreezing)."""
        groups = self.optimizer.param_groups
        key = tuple((id(g), *(id(p) * 2 + p.requires_grad for p in g["params"])) for g in groups)
        if key == self._layout_key:
            return
        self._sample = Sample(groups, self._size, answers=self._answers)
        self._layout_key = key
        self._weight_views, self._moment_views = [], []
        self._before = self._after = self._gradient = self._mean = None
        parts = self._sample.parts
        self._starts = np.array([part.position for part in parts], np.intp)
        self._multiplicity = np.array([part.parameter.numel() / part.count for part in parts], np.float32)
        self._group_ranges = [_range_of(group, parts) for group in groups]

    # --- on the host -------------------------------------------------------------------------------------

    def signals(self, host: Mapping[str, Vector], beta2: float, eps: float) -> dict[str, float]:
        """The sampled signals of one decision.

        Args:
            host: the segments, on the host, ranks joined, and `steps_taken`; what is absent was not measured.
            beta2, eps: of the optimizer, where it is an Adam.

        Returns:
            signal name → value; NaN or absent where there is nothing to measure.
        """
        signals: dict[str, float] = {}
        with np.errstate(all="ignore"):  # what is not finite is no measurement
            gradient = host.get("gradient")
            if gradient is not None:
                signals |= {name: estimate(self._sampled(gradient)) for name, estimate in ESTIMATORS.values()}
                if self._gradient is not None:
                    norms = math.sqrt(float(gradient @ gradient) * float(self._gradient @ self._gradient))
                    signals["grad_cosine"] = float(gradient @ self._gradient) / norms if norms > 0 else math.nan
                if "v" in host and "steps_taken" in host:
                    signals["surprise"] = _surprise(gradient, host["v"], float(host["steps_taken"][0]), beta2, eps)
            if "before" in host and "after" in host:
                signals |= _update_signals(host["before"], host["after"])
        return signals

    def group_entropies(self, gradient: Vector) -> tuple[float, ...]:
        """The chosen estimator of each parameter group alone; () for none.

        NaN for a group without weight matrices, and for one that had no gradient.
        """
        if self._group_entropy is None:
            return ()
        _, estimate = ESTIMATORS[self._group_entropy]
        sampled = self._sampled(gradient)
        with np.errstate(all="ignore"):
            # Zeros alone: the group took no part in this step.
            return tuple(
                estimate(sampled.part(*r)) if r and gradient[slice(*r)].any() else math.nan for r in self._group_ranges
            )

    def _sampled(self, gradient: Vector) -> Sampled:
        return Sampled(gradient, self._mean, self._starts, self._multiplicity)

    def forget(self) -> None:
        """Drops what the next measurement would compare with: after a rollback it belongs to another history."""
        self._before = self._after = self._gradient = self._mean = None

    def remember(self, gradient: Vector) -> None:
        """Takes a healthy gradient as what the next one is compared with; a poisoned one must never become it."""
        self._gradient = gradient
        before = gradient if self._mean is None else self._mean
        with np.errstate(over="ignore"):
            mean = before + MEAN_WEIGHT * (gradient - before)
        self._mean = mean if np.isfinite(mean).all() else gradient  # an overflow would stay for ever

    def state_dict(self) -> dict[str, Any]:
        """The reference gradients and the last update: what the next measurement compares with."""
        gradient, mean = (None if g is None else torch.from_numpy(g) for g in (self._gradient, self._mean))
        return {"gradient": gradient, "mean": mean, "before": self._before, "after": self._after}

    def load_state_dict(self, state: Mapping[str, Any], *, own: bool = True) -> None:
        """Restores `state_dict`, after the optimizer's own state has been loaded; `own`: whether this rank saved it."""
        self._lay_out()
        self._gradient, self._mean = (
            None if g is None else g.cpu().numpy() for g in (state["gradient"], state["mean"])
        )
        self._before, self._after = (
            None if t is None or (not own and self.sharded) else t.to(self._sample.device, copy=True)
            for t in (state["before"], state["after"])
        )
        if not (own or self._answers):
            for part in (self._before, self._after):
                if part is not None:
                    part.zero_()


def _range_of(group: dict[str, Any], parts: list[Part]) -> tuple[int, int] | None:
    """Where a parameter group's elements lie in the sample."""
    own = [part for part in parts if part.group is group]
    return (own[0].position, own[-1].position + own[-1].count) if own else None


def _joint_norm(gradients: list[torch.Tensor]) -> torch.Tensor | None:
    if not gradients:
        return None
    dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    # Half precision ends at 65504: the norm of a healthy tensor would be infinite.
    halves = any(g.dtype in (torch.float16, torch.bfloat16) for g in dense) and not any(g.is_complex() for g in dense)
    norms = list(torch._foreach_norm(dense, 2, torch.float32) if halves else torch._foreach_norm(dense))
    if len({(n.device, n.dtype) for n in norms}) > 1:
        norms = [n.float().to(norms[0].device) for n in norms]
    return torch.linalg.vector_norm(torch.stack(norms).float())


def _split(
    grad_norm: torch.Tensor | float, answers: bool
) -> tuple[torch.Tensor | float | None, torch.Tensor | float | None]:
    """A norm that the caller gave: the whole one, or this rank's share of a `DTensor` that is not reduced yet."""
    if isinstance(grad_norm, torch.Tensor) and is_sharded(grad_norm):
        return None, own_shard(grad_norm, answers=answers)
    return (grad_norm if answers else None), None


def _dense_gradient(part: Part) -> torch.Tensor | None:
    gradient = part.parameter.grad
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def _surprise(gradient: Vector, v: Vector, steps_taken: float, beta2: float, eps: float) -> float:
    """RMS_t of Wortsman et al. (2304.13013, §3.4) with the bias-corrected v that this step is about to use."""
    known = ~(v < 0)  # a NaN stays: what is poisoned must not pass for unknown
    if not known.all():
        gradient, v = gradient[known], v[known]
    squared = gradient * gradient
    corrected = (beta2 * v + (1.0 - beta2) * squared) / (1.0 - beta2 ** (steps_taken + 1.0))
    return math.sqrt(float((squared / np.maximum(corrected, eps**2)).mean()))


def _update_signals(before: Vector, after: Vector) -> dict[str, float]:
    moved, size = after - before, float(before @ before)
    # A matrix that starts at zero (LoRA's B) has no relative size yet: NaN rather than infinity.
    ratio = math.sqrt(float(moved @ moved) / size) if size > 0 else math.nan
    return {"update_ratio": ratio, "weight_rms": math.sqrt(size / before.size)}


def _second_moment(state: Mapping[str, Any] | None, part: Part) -> torch.Tensor | None:
    """Adam's v of this parameter, where the optimizer keeps it element by element."""
    if not state or "step" not in state or "betas" not in part.group or "d" in part.group:
        return None  # "d": Prodigy's is that of d·g, and no gradient would be a surprise to it
    v = state.get("exp_avg_sq")
    return v if v is not None and v.shape == part.parameter.shape else None
