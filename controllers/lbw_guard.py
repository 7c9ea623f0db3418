"""LBW-Guard-style: names the regime that a run is in and holds its update-to-weight ratio where runs thrive.

Our own design. The published LBW-Guard (arXiv 2605.19008) does not give its control law.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lbw_rl.action import Action, Directive
from lbw_rl.controller import Context, Controller
from lbw_rl.setpoint import RatioPlant
from lbw_rl.signals import Telemetry
from lbw_rl.statistics import ExponentialMean
from lbw_rl.update_target import DISPLACEMENT, STEEPNESS, UpdateTarget, shorter_momentum

_MOST_REFUSED = 10
"""Steps that are skipped in a row: if the weights are to blame and not the batch, nothing gets better until they move again."""
_USUAL_SURPRISE = 1.3  # of a healthy run; 1 would be a gradient that its second moment knows exactly


class LBWGuard(Controller):
    """Inner loop on the update-to-weight ratio, guarded by loss, gradient norm and surprise.

    Set-point: r* of `UpdateTarget`, times a caution factor in [0.1, 1]. The inner loop identifies ratio = gain · rate and
    sets the rate that gives r*, so the base rate cancels out of the run. Momentum is shortened to an average over
    `momentum_steps`, where the authority allows: a short run overshoots less, and its set-point has more room on both sides.

    Regimes, first match wins; each comes with its evidence:

    | regime | evidence | what it does |
    |---|---|---|
    | non-finite | loss or gradient norm NaN or infinite | skip |
    | gradient-burst | gradient norm > 8 deviations above and > 5 × its mean, at most ten times in a row | skip |
    | bad-batch | loss > 6 deviations and > 1 nat above its mean, at most ten times in a row | skip |
    | diverged | fast mean loss > best + `damage` nats, for a while | rollback (where permitted), caution ÷ 2 |
    | loss-spike | loss > 6 deviations above its mean | caution ÷ 2 |
    | overshoot | surprise > 2.5: the second moment lags the gradient | at the onset: scale × 1.3 / surprise, for that step |
    | calibrating | no update measured yet | r* as far as it can be foretold, at most the base rate |
    | holding-back / raising | scale needed is < 1/2 / > 2 | r* |
    | annealing | progress > 0.7 | r* |
    | steady | none of the above | r* |

    Args:
        displacement: r* · sqrt(T · H) at the start, H the steps that momentum averages over.
        steepness: nats per unit of relative update up to which the displacement is granted in full.
        momentum_steps: longest average that momentum may keep, steps; a shorter one is left alone.
        half_life: decisions over which the plant's gain is averaged.
        damage: nats above the best mean loss that count as lost.

    Raises:
        ValueError: an argument that is not > 0.
    """

    name = "lbw-guard"
    time_limit = None

    def __init__(
        self,
        displacement: float = DISPLACEMENT,
        steepness: float = STEEPNESS,
        momentum_steps: float = 5.0,
        half_life: float = 2.0,
        damage: float = 1.0,
    ) -> None:
        given = {
            "displacement": displacement,
            "steepness": steepness,
            "momentum_steps": momentum_steps,
            "half_life": half_life,
            "damage": damage,
        }
        for name, value in given.items():
            if not value > 0:
                raise ValueError(f"lbw-guard.{name}: {value} must be > 0")
        self.displacement, self.steepness, self.momentum_steps = displacement, steepness, momentum_steps
        self.half_life, self.damage = half_life, damage
        self.reset(Context())

    def reset(self, context: Context) -> None:
        """Forgets the plant, the baselines and the caution."""
        self._target = UpdateTarget(context, self.displacement, self.steepness)
        self._momentum_scale = shorter_momentum(context.momentum, self.momentum_steps)
        self._plant = RatioPlant(self.half_life)
        self._loss, self._grad_norm = ExponentialMean(20), ExponentialMean(20)
        self._fast_loss = ExponentialMean(4)
        self._best_loss = math.inf
        self._lost = 0
        self._refused = 0  # steps in a row
        self._overshooting = False
        self._caution = 1.0
        self._last_scale = 1.0

    def act(self, telemetry: Telemetry) -> Action:
        """Names the regime, updates the baselines with what is healthy, and asks for the set-point's rate."""
        t = telemetry
        self._plant.observe(t)
        if 0 <= t.momentum < 1:  # a schedule may move it
            self._momentum_scale = shorter_momentum(t.momentum, self.momentum_steps)
        if t.nonfinite == 1:  # NaN: no gradient was there to judge
            return self._skip("non-finite", {"nonfinite": 1.0})
        burst, bad_batch = self._is_burst(t.grad_norm), self._is_bad_batch(t.loss)
        if not (burst or bad_batch):
            self._refused = 0
        elif self._refused < _MOST_REFUSED:
            self._refused += 1
            if burst:
                evidence = {"grad_norm": t.grad_norm, "mean": self._grad_norm.mean}
                # The burst enters the baseline clamped: a lasting change of level is learned, one outlier hardly shows.
                self._grad_norm.update(2 * self._grad_norm.mean)
                return self._skip("gradient-burst", evidence)
            return self._skip("bad-batch", {"loss": t.loss, "mean": self._loss.mean})  # enters no baseline
        alarm, evidence = self._alarm(t)
        self._grad_norm.update(t.grad_norm)
        self._target.observe(t)
        onset = alarm == "overshoot" and not self._overshooting
        self._overshooting = alarm == "overshoot"
        if alarm and alarm != "overshoot":
            self._caution = max(0.1, self._caution / 2)
        else:
            self._caution = min(1.0, self._caution * 1.1)
        target = self._target.ratio(t) * self._caution
        scale = self._plant.scale_for(target, t.learning_rate)
        if scale is None:
            return self._propose(self._target.first_scale(t), alarm or "calibrating", evidence)
        if onset:
            # Surprise foretells the first too large update, which the plant has yet to see; from then on it holds them.
            scale *= min(1.0, _USUAL_SURPRISE / t.surprise)
        evidence = {**evidence, "update_ratio": t.update_ratio, "target": target, "caution": self._caution}
        if math.isfinite(steepness := self._target.steepness()):
            evidence["steepness"] = steepness
        if alarm == "diverged":
            self._reset_detectors()
            return self._propose(scale, alarm, evidence, Directive.ROLLBACK)
        return self._propose(scale, alarm or _tracking(scale, t.progress), evidence)

    def _is_burst(self, grad_norm: float) -> bool:
        baseline = self._grad_norm
        return baseline.count >= 10 and baseline.score(grad_norm) > 8 and grad_norm > 5 * baseline.mean

    def _is_bad_batch(self, loss: float) -> bool:
        baseline = self._loss
        return baseline.count >= 10 and baseline.score(loss, floor=0.02) > 6 and loss > baseline.mean + 1.0

    def _alarm(self, t: Telemetry) -> tuple[str | None, dict[str, float]]:
        """The instability that the signals show, if any; healthy losses enter the baseline."""
        fast = self._fast_loss.update(t.loss)
        known = self._loss.count >= 10
        spike = known and self._loss.score(t.loss, floor=0.02) > 6
        if not spike:
            self._loss.update(t.loss)
        elif math.isfinite(t.loss):
            self._loss.update(self._loss.mean + 6 * max(self._loss.deviation, 0.02))
        self._best_loss = min(self._best_loss, fast) if known else self._best_loss
        self._lost = self._lost + 1 if fast > self._best_loss + self.damage else 0
        if self._lost >= 5:
            return "diverged", {"loss": fast, "best": self._best_loss}
        if spike:
            return "loss-spike", {"loss": t.loss, "mean": self._loss.mean, "deviation": self._loss.deviation}
        if t.surprise > 2.5:
            return "overshoot", {"surprise": t.surprise}
        return None, {}

    def _reset_detectors(self) -> None:
        # After a rollback the loss returns to the old level; keeping the alarm would be an absorbing state.
        self._lost = 0
        self._fast_loss, self._best_loss = ExponentialMean(4), math.inf
        self._loss = ExponentialMean(20)

    def rolled_back(self) -> None:
        """Goes on with half the caution factor that the good state had: what came after it led astray."""
        self._caution = max(0.1, self._caution / 2)
        self._reset_detectors()

    def _skip(self, regime: str, evidence: dict[str, float]) -> Action:
        return Action(
            lr_scale=self._last_scale,
            momentum_scale=self._momentum_scale,
            directive=Directive.SKIP,
            regime=regime,
            evidence=evidence,
        )

    def _propose(
        self, scale: float, regime: str, evidence: dict[str, float], directive: Directive = Directive.PROCEED
    ) -> Action:
        self._last_scale = scale
        return Action(
            lr_scale=scale,
            momentum_scale=self._momentum_scale,
            directive=directive,
            regime=regime,
            evidence=evidence,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plant, baselines and caution."""
        return {
            "plant": self._plant.state_dict(),
            "target": self._target.state_dict(),
            "loss": self._loss.state_dict(),
            "grad_norm": self._grad_norm.state_dict(),
            "fast_loss": self._fast_loss.state_dict(),
            "best_loss": self._best_loss if math.isfinite(self._best_loss) else None,
            "lost": self._lost,
            "refused": self._refused,
            "overshooting": self._overshooting,
            "caution": self._caution,
            "last_scale": self._last_scale,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self._plant.load_state_dict(state["plant"])
        self._target.load_state_dict(state["target"])
        self._loss.load_state_dict(state["loss"])
        self._grad_norm.load_state_dict(state["grad_norm"])
        self._fast_loss.load_state_dict(state["fast_loss"])
        self._best_loss = math.inf if state["best_loss"] is None else state["best_loss"]
        self._lost, self._caution, self._last_scale = state["lost"], state["caution"], state["last_scale"]
        self._refused, self._overshooting = state["refused"], state["overshooting"]


def _tracking(scale: float, progress: float) -> str:
    """The regime of a run without alarms."""
    if scale < 0.5:
        return "holding-back"
    if scale > 2.0:
        return "raising"
    return "annealing" if progress > 0.7 else "steady"
