"""A textbook PID loop in the log domain: holds one positive signal at a set-point by the learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from lbw_rl.action import NEUTRAL, Action
from lbw_rl.controller import Context, Controller
from lbw_rl.setpoint import ratio_level
from lbw_rl.signals import Telemetry

Measured = Literal["update_ratio", "grad_norm", "surprise"]


class PID(Controller):
    """u ← u_executed + Kp·(e − e′) + Ki·e + Kd·(e − 2e′ + e″), lr_scale = exp(u), e = ln(set-point / signal).

    The velocity form integrates onto the scale that was *executed*, so a bound that clips it cannot wind the
    integral up, and it starts from scale 1, so switching it on gives no bump. The set-point follows the user's
    own schedule (× scheduled rate / its peak): an annealing that the user asked for is kept.

    Args:
        signal: what to hold: "update_ratio", "grad_norm" or "surprise".
        setpoint: its value at the schedule's peak; "auto" takes 0.5/sqrt(total steps) for the update ratio.
        kp, ki, kd: proportional, integral and derivative gain per decision, in the log domain. The plant
            answers within one step, so ki alone sets the speed: 1 is dead-beat, 0.3 averages about three steps.
        deadband: |e| below this leaves the scale alone, in natural-log units.

    Raises:
        ValueError: an unknown signal, a set-point ≤ 0, "auto" for another signal, or a negative gain.
    """

    name = "pid"
    time_limit = None

    def __init__(
        self,
        signal: Measured = "update_ratio",
        setpoint: float | Literal["auto"] = "auto",
        kp: float = 0.1,
        ki: float = 0.3,
        kd: float = 0.0,
        deadband: float = 0.0,
    ) -> None:
        if signal not in get_args(Measured):
            raise ValueError(f"pid.signal: {signal!r} is unknown; accepted: {', '.join(get_args(Measured))}")
        if setpoint == "auto" and signal != "update_ratio":
            raise ValueError(f"pid.setpoint: 'auto' is known for update_ratio only; give a number for {signal}")
        if setpoint != "auto" and not (isinstance(setpoint, int | float) and 0 < setpoint < math.inf):
            raise ValueError(f"pid.setpoint: {setpoint!r} must be a number > 0 or 'auto'")
        for name, gain in (("kp", kp), ("ki", ki), ("kd", kd), ("deadband", deadband)):
            if not 0 <= gain < math.inf:
                raise ValueError(f"pid.{name}: {gain} must be >= 0 and finite")
        self.signal, self.setpoint = signal, setpoint
        self.kp, self.ki, self.kd, self.deadband = kp, ki, kd, deadband
        self.reset(Context())

    def reset(self, context: Context) -> None:
        """Forgets errors and the schedule's peak."""
        self._level = ratio_level(context.total_steps) if self.setpoint == "auto" else float(self.setpoint)
        self._errors: list[float] = []  # newest last, at most two
        self._peak_lr = 0.0

    def act(self, telemetry: Telemetry) -> Action:
        """One step of the velocity form; without a usable signal the executed scale is held."""
        t = telemetry
        if math.isfinite(t.learning_rate):
            self._peak_lr = max(self._peak_lr, t.learning_rate)
        measured = getattr(t, self.signal)
        shape = t.learning_rate / self._peak_lr if self._peak_lr > 0 else 1.0
        if not (0 < measured < math.inf and 0 < shape < math.inf and t.lr_scale > 0):
            return Action(lr_scale=t.lr_scale, regime="calibrating") if t.lr_scale > 0 else NEUTRAL
        target = self._level * shape
        error = math.log(target / measured)
        if abs(error) < self.deadband:
            error = 0.0
        first = self._errors[-1] if self._errors else error
        second = self._errors[-2] if len(self._errors) > 1 else first
        change = self.kp * (error - first) + self.ki * error + self.kd * (error - 2 * first + second)
        self._errors = [*self._errors[-1:], error]
        regime = "steady" if abs(error) < 0.7 else ("raising" if error > 0 else "holding-back")
        evidence = {"measured": measured, "target": target, "error": error}
        return Action(lr_scale=t.lr_scale * math.exp(min(50.0, max(-50.0, change))), regime=regime, evidence=evidence)

    def state_dict(self) -> dict[str, Any]:
        """The last errors and the schedule's peak."""
        return {"errors": list(self._errors), "peak_lr": self._peak_lr}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self._errors, self._peak_lr = list(state["errors"]), state["peak_lr"]
