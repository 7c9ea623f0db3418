"""EntroPIC, global level: holds the gradient entropy at a target by learning rate and momentum."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any, Literal, get_args

from lbw_rl.action import Action
from lbw_rl.controller import Context, Controller
from lbw_rl.signals import Telemetry

Law = Literal["pi", "threshold"]


class EntroPIC(Controller):
    """Compares the gradient entropy H (mean of the last three decisions) with a target H*.

    `threshold` is the source's law to the letter, but anchored to the schedule instead of compounding:
    H/H* < 0.9 → learning rate × 0.8, momentum horizon × 1.2; H/H* > 1.1 → × 1.2 and × 0.9; else neutral.

    `pi` is the law of the published EntroPIC (arXiv 2511.15248: α = clip(Kp·e + Ki·Σe, −1, 1), Kp 1, Ki 0.01)
    with e = ln(H/H*) and the anti-windup that it lacks; ln(lr_scale) = gain · α. Low entropy lowers the rate,
    as the threshold law does. It acts on execution only: the loss is not reweighted.

    Args:
        law: "pi" or "threshold".
        target: H* in (0, 1], or "auto": the median entropy of the first `warmup` decisions.
        recalibrate: decisions after which an automatic target is measured anew.
        smoothing: decisions averaged.
        warmup: decisions that an automatic target is measured over.
        kp, ki: proportional and integral gain of the pi law, per decision.
        gain: ln(lr_scale) at α = 1.

    Raises:
        ValueError: an unknown law, a target outside (0, 1], a count below 1, or a gain outside [0, 100).
    """

    name = "entropic"
    time_limit = None

    def __init__(
        self,
        law: Law = "pi",
        target: float | Literal["auto"] = "auto",
        recalibrate: int = 1000,
        smoothing: int = 3,
        warmup: int = 20,
        kp: float = 1.0,
        ki: float = 0.01,
        gain: float = 1.0,
    ) -> None:
        if law not in get_args(Law):
            raise ValueError(f"entropic.law: {law!r} is unknown; accepted: {', '.join(get_args(Law))}")
        if target != "auto" and not (isinstance(target, int | float) and 0 < target <= 1):
            raise ValueError(f"entropic.target: {target!r} must be in (0, 1] or 'auto'")
        for name, count in (("recalibrate", recalibrate), ("smoothing", smoothing), ("warmup", warmup)):
            if not (isinstance(count, int) and count >= 1):
                raise ValueError(f"entropic.{name}: {count!r} must be a whole number >= 1")
        for name, value in (("kp", kp), ("ki", ki), ("gain", gain)):
            if not 0 <= value < 100:
                raise ValueError(f"entropic.{name}: {value} must be in [0, 100)")
        self.law, self.target, self.recalibrate, self.warmup = law, target, recalibrate, warmup
        self.smoothing, self.kp, self.ki, self.gain = smoothing, kp, ki, gain
        self.reset(Context())

    def reset(self, context: Context) -> None:
        """Forgets the entropy record, the integral and an automatic target."""
        self._recent: deque[float] = deque(maxlen=self.smoothing)
        self._record: list[float] = []
        self._target = None if self.target == "auto" else float(self.target)
        self._integral = 0.0
        self._seen = 0

    def act(self, telemetry: Telemetry) -> Action:
        """Compares smoothed entropy and target; neutral while there is no target yet."""
        h = telemetry.grad_entropy
        if not math.isfinite(h):
            return Action(regime="no-signal")
        self._recent.append(h)
        self._seen += 1
        self._calibrate(h)
        if self._target is None:
            return Action(regime="calibrating", evidence={"entropy": h})
        smoothed = sum(self._recent) / len(self._recent)
        evidence = {"entropy": smoothed, "target": self._target}
        ratio = smoothed / self._target
        regime = "low-entropy" if ratio < 0.9 else "high-entropy" if ratio > 1.1 else "steady"
        if self.law == "threshold":
            lr, momentum = {"low-entropy": (0.8, 1.2), "high-entropy": (1.2, 0.9), "steady": (1.0, 1.0)}[regime]
            return Action(lr_scale=lr, momentum_scale=momentum, regime=regime, evidence=evidence)
        error = math.log(max(ratio, 1e-6))
        alpha = self.kp * error + self._integral
        if abs(alpha) < 1.0 or alpha * error < 0:  # anti-windup: a saturated output integrates only inwards
            self._integral += self.ki * error
        alpha = min(1.0, max(-1.0, self.kp * error + self._integral))
        return Action(lr_scale=math.exp(self.gain * alpha), regime=regime, evidence={**evidence, "alpha": alpha})

    def _calibrate(self, h: float) -> None:
        """Measures an automatic target over `warmup` decisions, then again every `recalibrate`."""
        if self.target != "auto":
            return
        if (self._seen - 1) % self.recalibrate < self.warmup:
            self._record.append(h)
            if len(self._record) == self.warmup:
                self._target = max(median(self._record), 1e-3)
                self._record = []

    def state_dict(self) -> dict[str, Any]:
        """The entropy record, target and integral."""
        return {
            "recent": list(self._recent),
            "record": list(self._record),
            "target": self._target,
            "integral": self._integral,
            "seen": self._seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self._recent = deque(state["recent"], maxlen=self.smoothing)
        self._record = list(state["record"])
        self._target, self._integral, self._seen = state["target"], state["integral"], state["seen"]
