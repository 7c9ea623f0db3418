"""How large the updates of a run may be: a target for the update-to-weight ratio that knows model, horizon and momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lbw_rl.controller import Context
from lbw_rl.setpoint import UNKNOWN_HORIZON, falling
from lbw_rl.signals import Telemetry
from lbw_rl.statistics import ExponentialMean

DISPLACEMENT = 1.4
"""r · sqrt(T · H) at the start, T the planned steps and H = 1/(1 − β) the steps that momentum averages over: how far the
weights walk, relative to their size, if the updates' directions are random. Chosen on `mini-qwen2` at 300 and 1000 steps."""
STEEPNESS = 20.0
"""Nats of first-order loss change per unit of relative update, ‖g‖·‖w₀‖, up to which a run takes the whole displacement.
On `mini-qwen2` it does not bind; chosen on wider models and on fine-tuning that no suite holds (docs/LOG.md, 2026-11-27)."""
_OF_ADAPTERS = 0.55  # of the steepness: either factor moves the product
_LARGEST_SHARE = 4.0  # of the displacement, for adapters: a gradient that vanishes must not ask for steps without end
_UNKNOWN_AVERAGING = (
    5.0  # steps: what the displacement was chosen with; Schedule-Free goes astray with 1, not with 5 or 10
)
_PLAIN_AVERAGING = (
    20.0  # steps, for SGD: a gradient's few large entries take half the ratio that an even update does, at any momentum
)
_RAMP = 10  # steps: the length of Adam's memory; the same start whatever the base rate and its warmup
_FORGET = 0.5 ** (1 / 100)  # per decision, of the largest gradient norm: half-life 100 decisions
_USUAL_RMS = 0.02  # of fresh weights: the initial deviation of Qwen2, Llama and GPT-2


class UpdateTarget:
    """The update-to-weight ratio that a run should have now.

    r* = displacement / sqrt(T · H) · min(1, steepness / S) · ramp · shape, with

    - H = 1/(1 − β), β the momentum as executed: what is held is the displacement, not the single step; 5 where it is unknown
      and 20 for SGD, with or without momentum;
    - S = ‖g‖ · ‖w₀‖ (nats), g the gradient and w₀ the weights at the start: the loss change, to first order, of an update as
      large as the weights. A wider, deeper or pretrained model is steeper and takes smaller steps. Factors of low-rank
      adapters have no size of their own that would mean anything: there it is 0.55 · steepness / S alone (at most 4), with
      the weights as they are now, so that their size cancels and ‖g‖ · ‖Δw‖ itself is held;
    - shape = min(sqrt(1 − p), η/η_max): p the progress, η the scheduled rate and η_max its largest so far, so that an annealing
      that the user asked for is kept, and none comes twice. Without a horizon T = 1000 and the schedule alone.

    The gradient is taken to be that of a mean loss in nats per token.

    Args:
        context: of the run.
        displacement: r · sqrt(T · H) at the start.
        steepness: S up to which it is granted in full.
    """

    def __init__(self, context: Context, displacement: float, steepness: float) -> None:
        self._displacement = displacement / math.sqrt(context.total_steps or UNKNOWN_HORIZON)
        self._steepness = steepness
        self._low_rank, self._momentum, self._normalised = context.low_rank, context.momentum, context.normalised
        self._root_weights = math.sqrt(context.weights) if context.weights else math.nan
        self._grad_norm = ExponentialMean(4.0)
        self._largest = 0.0
        self._weight_rms = math.nan
        self._peak = 0.0

    def observe(self, t: Telemetry) -> None:
        """Takes in a decision's telemetry, unless its gradient is not to be trusted."""
        norm = self._grad_norm.update(t.grad_norm)
        if math.isfinite(norm):
            self._largest = max(norm, self._largest * _FORGET)
        if t.weight_rms > 0 and (self._low_rank or not self._weight_rms > 0):
            self._weight_rms = t.weight_rms

    def ratio(self, t: Telemetry) -> float:
        """r* for the step at hand, from the telemetry that it is decided on."""
        ramp = min(1.0, (t.step + 1) / _RAMP) if math.isfinite(t.step) else 1.0
        return self._displacement / math.sqrt(self._horizon(t)) * self._permitted() * ramp * self._shape(t)

    def first_scale(self, t: Telemetry) -> float:
        """Scale of the very first step, of which nothing is measured yet: never more than the base rate.

        As if the optimizer moved every weight by its rate, as Adam's kin do, and weights were as large as fresh ones usually are.
        """
        return min(1.0, self.ratio(t) * _USUAL_RMS / t.learning_rate) if t.learning_rate > 0 else 1.0

    def steepness(self) -> float:
        """S in nats; NaN before it is measured."""
        return self._largest * self._weight_rms * self._root_weights if self._largest > 0 else math.nan

    def _permitted(self) -> float:
        s = self.steepness()
        share = self._steepness / s if s > 0 else math.nan
        if self._low_rank:
            return min(_LARGEST_SHARE, _OF_ADAPTERS * share) if math.isfinite(share) else 1.0
        return min(1.0, share) if math.isfinite(share) else 1.0

    def _horizon(self, t: Telemetry) -> float:
        if not self._normalised:
            return _PLAIN_AVERAGING
        momentum = t.momentum if 0 <= t.momentum < 1 else self._momentum  # a schedule may move it
        if momentum is None:
            return _UNKNOWN_AVERAGING
        scale = t.momentum_scale if t.momentum_scale > 0 else 1.0
        return max(1.0, scale / (1.0 - momentum))

    def _shape(self, t: Telemetry) -> float:
        if not t.learning_rate > 0:
            return falling(t.progress)
        self._peak = max(self._peak, t.learning_rate)
        return min(falling(t.progress), t.learning_rate / self._peak)

    def state_dict(self) -> dict[str, Any]:
        """What is known of gradient, weights and schedule."""
        return {
            "grad_norm": self._grad_norm.state_dict(),
            "largest": self._largest,
            "weight_rms": self._weight_rms if math.isfinite(self._weight_rms) else None,
            "peak": self._peak,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self._grad_norm.load_state_dict(state["grad_norm"])
        self._largest, self._peak = state["largest"], state["peak"]
        self._weight_rms = math.nan if state["weight_rms"] is None else state["weight_rms"]


def shorter_momentum(momentum: float | None, horizon: float) -> float:
    """The momentum scale that averages over `horizon` steps, or leaves a momentum alone that is as short already."""
    return 1.0 if momentum is None else min(1.0, horizon * (1.0 - momentum))
