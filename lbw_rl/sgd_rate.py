"""The learning rate at which SGD takes steps as large as Adam's, measured as SWATS does (Keskar & Socher 2017)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lbw_rl.action import Action, Directive
from lbw_rl.actuator import scaled_decay
from lbw_rl.hand_over import decouples_decay, is_adam
from lbw_rl.probe import Probe
from lbw_rl.signals import Telemetry
from lbw_rl.statistics import ExponentialMean

Vector = NDArray[np.float32]
Terms = tuple[tuple[float, ...], ...]
"""What an update was executed with, a row per sampled parameter group: elements, rate η, share of the weights that
decoupled decay left, coupled decay, sign of the gradient (−1 where the objective is maximised)."""

HALF_LIFE = 50.0
"""Updates after which one projection's weight in Λ has halved; the paper has Adam's β₂, 693 updates at 0.999."""
RECENT_HALF_LIFE = 5.0
"""The same for the mean of the last few projections, which Λ is compared with."""
TOLERANCE = 0.2
"""Λ is known while |ln Λ − recent mean of ln γ| ≤ ln(1 + this); the paper asks |Λ − γ| < ε of a single γ."""
LARGEST_GRADIENT = 5.0
"""Times the mean gradient norm of the measured steps, beyond which Λ does not hold."""
_OVERFLOWN = 1e300  # stands for a norm that is not finite: the momentum may be anything for long


def projected_rate(before: Vector, after: Vector, gradient: Vector, terms: Terms) -> float:
    """Rate γ, in units of the executed learning rate, at which an SGD step projects onto an Adam step p as p itself.

    Asked of the step −γ·η·g: its projection onto p is p where γ = p·p / −(p·ηg). This is Keskar & Socher (1712.07628,
    §3, algorithm 1) with the rate η inside the product, so that groups of different rates share one γ and the schedule
    goes on to multiply it. Decoupled weight decay is no part of p; a coupled one is part of g.

    Args:
        before, after: sampled weights around the Adam step, shape (n,).
        gradient: the gradient that this step was made of, on the same sample.
        terms: what it was executed with.

    Returns:
        γ; negative where the step leads uphill on this gradient, NaN where nothing moved or the shapes differ.
    """
    elements, *columns = zip(*terms)
    counts = np.array(elements, np.int64)
    if not len(before) == len(after) == len(gradient) == counts.sum():
        return math.nan
    rate, kept, coupled, sign = (np.repeat(np.array(column), counts) for column in columns)
    step = after - kept * before
    along = float(step @ (rate * (sign * gradient + coupled * before)))
    return float(step @ step) / -along if along else math.nan


class RateMeter:
    """Brings each Adam step together with the gradient that it was made of; what does not belong together is no γ.

    An update is measured a decision after its gradient, and late telemetry by one more: the terms travel with the
    measured weights. With several steps per decision, after a skipped or a handed-over step, or where the gradient was
    not finite, there is no pair.

    Args:
        optimizer: whose steps are measured.
        probe: that holds the sample and the gradient seen last.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, probe: Probe) -> None:
        self._optimizer, self._probe = optimizer, probe
        self._terms: Terms | None = None
        self._gradient_seen = False  # of the step at hand
        self._gradient_kept = False  # of the measurement evaluated last, as the probe's reference

    def measured(self) -> Terms | None:
        """Notes that the gradient at hand is being measured; the terms of the update that is measured with it."""
        terms, self._terms, self._gradient_seen = self._terms, None, True
        return terms

    def executed(self, action: Action) -> None:
        """Notes the rates of the step about to happen; called for every step, with the scales written."""
        own_rule = action.directive is Directive.PROCEED and not action.hand_over
        self._terms = self._present_terms() if self._gradient_seen and own_rule else None
        self._gradient_seen = False

    def rate(self, values: Mapping[str, Vector], terms: Terms | None) -> float:
        """γ of one measurement, called once for each of them in order.

        Args:
            values: the sampled segments `before` and `after`, on the host, ranks joined.
            terms: what `measured` returned when they were taken.
        """
        kept, self._gradient_kept = self._gradient_kept, False
        gradient = self._probe.reference
        if terms is None or not kept or gradient is None or not {"before", "after"} <= set(values):
            return math.nan
        with np.errstate(all="ignore"):  # what is not finite is no measurement
            return projected_rate(values["before"], values["after"], gradient, terms)

    def kept(self) -> None:
        """Notes that the gradient of the measurement evaluated last is the probe's reference now."""
        self._gradient_kept = True

    def missed(self) -> None:
        """Notes that a measurement has been lost, so that the probe's reference is not of the one before the next."""
        self._gradient_kept = False

    def forget(self) -> None:
        """After a rollback or a fault the last step and the last gradient do not belong together."""
        self._terms, self._gradient_seen, self._gradient_kept = None, False, False

    def _present_terms(self) -> Terms | None:
        if not is_adam(self._optimizer):
            return None
        terms = []
        for group, count in self._probe.sampled_groups:
            lr, decay = rate_on_host(group), float(group["weight_decay"])
            if math.isnan(lr):
                return None
            decoupled = decouples_decay(self._optimizer, group)
            kept, coupled = (1.0 - lr * decay, 0.0) if decoupled else (1.0, decay)
            terms.append((float(count), lr, kept, coupled, -1.0 if group["maximize"] else 1.0))
        return tuple(terms) or None

    def state_dict(self) -> dict[str, Any]:
        """The last step's terms and whether its gradient is there, as JSON data."""
        return {"terms": self._terms, "gradient_kept": self._gradient_kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self._terms = as_terms(state["terms"])
        self._gradient_kept, self._gradient_seen = state["gradient_kept"], False


def as_terms(saved: Any) -> Terms | None:
    """Terms as they come out of a checkpoint, where tuples may have become lists."""
    return None if saved is None else tuple(tuple(row) for row in saved)


class SgdRate:
    """Λ, the rate of SGD in units of the scheduled learning rate: an exponential geometric mean of γ.

    The mean is taken over ln γ, so that a γ whose denominator p·g came out small does not carry it away. A γ that is
    not finite or not positive never enters. Handed-over steps bring no γ, so Λ stands still meanwhile, as in SWATS.

    Adam's step does not grow with the gradient and SGD's does: a burst that Adam would hardly feel could throw the
    weights anywhere. So Λ holds only for gradients of about the size that it was measured at, in the momentum as well.
    ‖m‖ is bounded by the same mean of gradient norms, M ← β₁′·M + (1 − β₁′)·‖g‖ (triangle inequality), and a step of
    SGD by Λ·η·max(M, ‖g‖).
    """

    def __init__(self) -> None:
        self._log_mean = ExponentialMean(HALF_LIFE)
        self._recent = ExponentialMean(RECENT_HALF_LIFE)
        self._log_norm = ExponentialMean(HALF_LIFE)  # of the gradient, over the measured steps
        self._momentum = 0.0  # M, without the step at hand
        self._norm = math.nan  # of the step at hand

    def update(self, telemetry: Telemetry, beta1: float = 0.9) -> None:
        """Takes in one decision's measurement.

        Args:
            telemetry: γ (NaN where there was none), gradient norm and executed momentum scale are read.
            beta1: scheduled β₁ of Adam, the largest of all groups: how long a burst stays in the momentum.
        """
        gamma, before = telemetry.sgd_rate, self._norm
        self._norm = _OVERFLOWN if telemetry.nonfinite == 1 else telemetry.grad_norm
        if math.isfinite(before):
            decay = scaled_decay(beta1, telemetry.momentum_scale) if telemetry.momentum_scale > 0 else beta1
            self._momentum = decay * self._momentum + (1.0 - decay) * before
        if 0.0 < gamma < math.inf:
            self._log_mean.update(math.log(gamma))
            self._recent.update(math.log(gamma))
            if before > 0.0:
                self._log_norm.update(math.log(before))

    def withheld(self) -> None:
        """Notes that the gradient of the decision taken in last enters no momentum: its step does not happen."""
        self._norm = math.nan

    @property
    def value(self) -> float:
        """Λ; NaN before the first projection."""
        return math.exp(self._log_mean.mean)

    @property
    def unknown(self) -> str | None:
        """Why Λ is not known well enough to hand over, None if it is.

        SWATS' criterion, |Λ − γ| small, holds at the moment of the hand-over; here γ is averaged over its last few
        values, since a single one scatters by tens of per cent, and Λ must have been averaged over a half-life.
        Gradient and momentum must be within `LARGEST_GRADIENT` of those that it was measured at.
        """
        if self._log_mean.count < HALF_LIFE:
            return f"the SGD rate is not known: {self._log_mean.count} of {HALF_LIFE:g} Adam steps measured"
        distance = abs(self._recent.mean - self._log_mean.mean)
        if distance > math.log1p(TOLERANCE):
            return f"the SGD rate is still moving: recent {math.exp(self._recent.mean):.4g}, mean {self.value:.4g}"
        if not math.isfinite(self._norm):
            return "the gradient norm is not known"
        size = max(self._norm, self._momentum) / math.exp(self._log_norm.mean)
        if not size <= LARGEST_GRADIENT:
            return f"gradient or momentum may be {size:.3g} times those that the SGD rate was measured at"
        return None

    def state_dict(self) -> dict[str, Any]:
        """All of it, as JSON data."""
        means = {"mean": self._log_mean, "recent": self._recent, "norm": self._log_norm}
        latest = self._norm if math.isfinite(self._norm) else None
        return {**{k: v.state_dict() for k, v in means.items()}, "momentum": self._momentum, "latest_norm": latest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self._log_mean.load_state_dict(state["mean"])
        self._recent.load_state_dict(state["recent"])
        self._log_norm.load_state_dict(state["norm"])
        self._momentum = state["momentum"]
        self._norm = math.nan if state["latest_norm"] is None else state["latest_norm"]


def rate_on_host(group: Mapping[str, Any]) -> float:
    """A parameter group's learning rate; NaN without one, or where reading it would wait for the device."""
    lr = group.get("lr")
    on_device = isinstance(lr, torch.Tensor) and lr.device.type != "cpu"
    return math.nan if lr is None or on_device else float(lr)


def largest_beta1(optimizer: torch.optim.Optimizer) -> float:
    """Largest scheduled β₁ of an Adam's groups; 0 for other optimizers, which hand nothing over."""
    if not is_adam(optimizer):
        return 0.0
    betas = [group["betas"][0] for group in optimizer.param_groups]
    # On the device they are those of a capturable optimizer, which hands nothing over either.
    return max((float(b) for b in betas if not isinstance(b, torch.Tensor) or b.device.type == "cpu"), default=0.0)
