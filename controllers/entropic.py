"""EntroPIC: holds the entropy of the gradient at a target by learning rate, momentum and, at last, the optimizer's rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from lbw_rl.action import NEUTRAL, Action, Directive
from lbw_rl.controller import Context, Controller
from lbw_rl.entropy import ESTIMATORS
from lbw_rl.entropy_record import EntropyRecord, Target
from lbw_rl.recorder import brief, unbrief
from lbw_rl.safe_mode import SafeMode
from lbw_rl.setpoint import DISPLACEMENT, RatioPlant, falling, ratio_level
from lbw_rl.signals import Telemetry

Law = Literal["setpoint", "pi", "threshold"]

HEALTHY = 0.67
"""Element entropy of runs whose set-point is right; where it is too high, less (docs/entropy.md)."""
_GAINS = {"setpoint": (4.0, 0.2, math.log(2.0)), "pi": (1.0, 0.01, 1.0), "threshold": (0.0, 0.0, 0.0)}
"""Kp, Ki and gain of each law."""
_TOSS = (0.9, 0.98)
"""Direction entropies between which a low entropy begins to count, and counts in full (law "setpoint")."""
LOW, HIGH = 0.9, 1.1
"""H/H* below and above which the source's law acts, and which name the regimes."""
_THRESHOLD = ((0.8, 1.2), (1.2, 0.9))
"""The source's scales of learning rate and momentum, below and above; elsewhere 1."""
MICRO_BELOW, MICRO_SCALE = 0.8, 1.15
"""The source's micro level: a tensor whose entropy is 20 % under target gets 15 % more learning rate."""


class EntroPIC(Controller):
    """Compares the gradient's entropy H, the mean of the last `smoothing` decisions, with a target H*.

    Global laws, e = ln(H/H*); low entropy lowers the rate in each of them:

    | law | what it does |
    |---|---|
    | `threshold` | the source's, to the letter, but anchored to the schedule instead of compounding: H/H* < 0.9: rate × 0.8, momentum horizon × 1.2; H/H* > 1.1: × 1.2 and × 0.9; else neutral |
    | `pi` | ln(lr_scale) = gain · α, α = clip(Kp·e + Ki·Σe, −1, 1): the law of the published EntroPIC (arXiv 2511.15248) with the anti-windup that it lacks. It acts on execution only: the loss is not reweighted |
    | `setpoint` | α, held to [−1, 0], corrects the set-point of the loop on the update-to-weight ratio: r*(p) = displacement/√T · √(1−p) · exp(gain · α). A negative e counts only as far as the direction entropy says that the direction is a coin toss (0 at 0.9, whole at 0.98): energy on few elements with a direction that holds is a rate too low, not too high |

    Micro level (`micro`): each parameter group whose own entropy is 20 % under target gets × 1.15; with one group per
    tensor (`split_parameter_groups`) that is per-tensor control. It contradicts the global laws, where low entropy
    lowers the rate: the source has both, and they multiply.

    Macro level (`hand_over_below`): once H/H* has stayed below that for `patience` decisions the run is handed over to
    SGD with momentum, for good; the authority has to permit it.

    Safe mode (`band`): H/H* outside of it skips updates, then asks for a rollback; see `SafeMode`.

    Args:
        law: "setpoint", "pi" or "threshold".
        estimator: which entropy is H, of `lbw_rl.entropy.ESTIMATORS`.
        target: H* in (0, 1]; "auto": the mean of the entropy's own history; None: `HEALTHY` for the estimator "element",
            else "auto".
        recalibrate: healthy decisions after which an automatic target is taken anew.
        warmup: healthy decisions before the first automatic target.
        half_life: decisions after which an entry of the history weighs half.
        smoothing: decisions of the moving average.
        kp, ki: proportional and integral gain, per decision; None: 1 and 0.01 for "pi", 4 and 0.2 for "setpoint".
        gain: ln(scale) at α = 1; None: 1 for "pi", ln 2 for "setpoint": it halves the set-point at most.
        displacement: r* · √T at the start (law "setpoint").
        band: (low, high) around 1, or None for no safe mode.
        pause, cooldown: of the safe mode, in decisions.
        micro: whether groups are controlled one by one.
        hand_over_below: ratio H/H* in (0, 1), or None for no hand-over.
        patience: decisions in a row below it.

    Raises:
        ValueError: an unknown law or estimator, a target outside (0, 1], a band that does not contain 1, a count below
            1, a gain outside [0, 100), or `micro` with the estimator that compares tensors.
    """

    name = "entropic"
    time_limit = None

    def __init__(
        self,
        law: Law = "setpoint",
        estimator: str = "element",
        target: Target | None = None,
        recalibrate: int = 1000,
        warmup: int = 20,
        half_life: float = 100.0,
        smoothing: int = 3,
        kp: float | None = None,
        ki: float | None = None,
        gain: float | None = None,
        displacement: float = DISPLACEMENT,
        band: tuple[float, float] | None = None,
        pause: int = 3,
        cooldown: int = 50,
        micro: bool = False,
        hand_over_below: float | None = None,
        patience: int = 20,
    ) -> None:
        if law not in get_args(Law):
            raise ValueError(f"entropic.law: {law!r} is unknown; accepted: {', '.join(get_args(Law))}")
        if estimator not in ESTIMATORS:
            raise ValueError(f"entropic.estimator: {estimator!r} is unknown; accepted: {', '.join(ESTIMATORS)}")
        target = (HEALTHY if estimator == "element" else "auto") if target is None else target
        if target != "auto" and not (_is_number(target) and 0 < target <= 1):
            raise ValueError(f"entropic.target: {target!r} must be in (0, 1] or 'auto'")
        counts = {"recalibrate": recalibrate, "warmup": warmup, "smoothing": smoothing, "patience": patience}
        for name, count in (counts | {"pause": pause, "cooldown": cooldown}).items():
            if not (isinstance(count, int) and not isinstance(count, bool) and count >= 1):
                raise ValueError(f"entropic.{name}: {count!r} must be a whole number >= 1")
        gains = [own if own is not None else usual for own, usual in zip((kp, ki, gain), _GAINS[law])]
        for name, value in zip(("kp", "ki", "gain"), gains):
            if not (_is_number(value) and 0 <= value < 100):
                raise ValueError(f"entropic.{name}: {value!r} must be in [0, 100)")
        for name, value in {"half_life": half_life, "displacement": displacement}.items():
            if not (_is_number(value) and 0 < value < math.inf):
                raise ValueError(f"entropic.{name}: {value!r} must be a number > 0")
        if hand_over_below is not None and not (_is_number(hand_over_below) and 0 < hand_over_below < 1):
            raise ValueError(f"entropic.hand_over_below: {hand_over_below!r} must be in (0, 1), or None")
        if micro and estimator == "tensor":
            raise ValueError(
                "entropic.micro: estimator 'tensor' compares tensors and says nothing of one alone; "
                f"accepted: {', '.join(e for e in ESTIMATORS if e != 'tensor')}"
            )
        self.law, self.estimator, self.target, self.micro = law, estimator, target, micro
        (self.kp, self.ki, self.gain), self.displacement = gains, displacement
        self.hand_over_below, self.patience = hand_over_below, patience
        self._top = 0.0 if law == "setpoint" else 1.0  # of α: the set-point is only cut
        self.group_entropy = estimator if micro else None
        self._signal = ESTIMATORS[estimator][0]
        self._record_options = (target, smoothing, half_life, warmup, recalibrate)
        self._safe_mode_options = (_checked_band(band), pause, cooldown)
        self.reset(Context())

    def reset(self, context: Context) -> None:
        """Forgets the entropy's record, the integral and an automatic target."""
        self._level = ratio_level(context.total_steps, self.displacement)
        self._plant = RatioPlant(2.0)
        self._record, self._direction = self._new_record(), self._new_record()
        self._groups = [self._new_record() for _ in context.groups] if self.micro else []
        band, pause, cooldown = self._safe_mode_options
        self._safe_mode = SafeMode(band, pause, cooldown) if band is not None else None
        self._integral = self._alpha = 0.0
        self._low = 0  # decisions in a row below `hand_over_below`
        self._handed_over = False
        self._last = NEUTRAL

    def _new_record(self) -> EntropyRecord:
        return EntropyRecord(*self._record_options)

    def act(self, telemetry: Telemetry) -> Action:
        """Compares the smoothed entropy with its target; where it is missing the last correction is held."""
        self._plant.observe(telemetry)
        if telemetry.nonfinite == 1:  # such a gradient has no entropy, and would leave no run to govern
            return self._withheld("non-finite", {"nonfinite": 1.0}, Directive.SKIP)
        entropy = getattr(telemetry, self._signal)
        self._observe(telemetry, entropy)
        # An old value must not be judged again and again.
        ratio = self._record.ratio if math.isfinite(entropy) else math.nan
        regime = self._regime(ratio, entropy)
        evidence = self._evidence()
        directive = self._safe_mode(ratio) if self._safe_mode is not None else Directive.PROCEED
        if directive is not Directive.PROCEED:
            return self._withheld("safe-mode", evidence, directive)
        self._watch_for_hand_over(ratio)
        lr, momentum = 1.0, 1.0
        if self.law == "threshold":
            lr, momentum = _THRESHOLD[0] if ratio < LOW else _THRESHOLD[1] if ratio > HIGH else (1.0, 1.0)
        else:
            if math.isfinite(ratio):
                self._alpha = self._corrected(ratio)
            lr = math.exp(self.gain * self._alpha)
            evidence["alpha"] = self._alpha
        if self.law == "setpoint":
            target = self._level * lr * falling(telemetry.progress)
            scale = self._plant.scale_for(target, telemetry.learning_rate)
            if scale is None:
                lr, regime = 1.0, "calibrating"
            else:
                lr = scale
                evidence |= {"update_ratio": telemetry.update_ratio, "ratio_target": target}
        self._last = Action(
            lr_scale=lr,
            group_lr_scales=self._group_scales(telemetry.group_grad_entropy),
            momentum_scale=momentum,
            hand_over=self._handed_over,
            regime=regime,
            evidence={k: v for k, v in evidence.items() if math.isfinite(v)},
        )
        return self._last

    def _withheld(self, regime: str, evidence: dict[str, float], directive: Directive) -> Action:
        """The last action with another directive: where the authority denies it, the run goes on as it did."""
        return replace(self._last, directive=directive, regime=regime, evidence=evidence)

    def _observe(self, telemetry: Telemetry, entropy: float) -> None:
        if math.isfinite(entropy):
            target = self._record.target
            safe = self._safe_mode
            # Once disarmed, what lies outside counts: a run that has moved for good needs a target that follows.
            anomalous = safe is not None and safe.armed and target is not None and safe.outside(entropy / target)
            if self._record.update(entropy, healthy=not anomalous):
                self._integral = 0.0  # it was gathered against the old target
        if math.isfinite(telemetry.grad_entropy_direction):
            self._direction.update(telemetry.grad_entropy_direction)

    def _evidence(self) -> dict[str, float]:
        named = {"entropy": self._record.smoothed, "target": self._record.target, "direction": self._direction.smoothed}
        return {k: v for k, v in named.items() if v is not None and math.isfinite(v)}

    def _corrected(self, ratio: float) -> float:
        """α of the PI law, with anti-windup: a saturated output integrates only inwards."""
        error = math.log(max(ratio, 1e-6))
        if self.law == "setpoint" and error < 0:
            error *= self._tossed()
        alpha = self.kp * error + self._integral
        if (alpha > -1.0 or error > 0) and (alpha < self._top or error < 0):
            self._integral += self.ki * error
        return min(self._top, max(-1.0, self.kp * error + self._integral))

    def _tossed(self) -> float:
        """How far the gradient's direction is a coin toss, in [0, 1]; 0 before it is known."""
        low, high = _TOSS
        share = (self._direction.smoothed - low) / (high - low)
        return min(1.0, max(0.0, share)) if math.isfinite(share) else 0.0

    def _regime(self, ratio: float, entropy: float) -> str:
        if not math.isfinite(entropy):
            return "no-signal"
        if not math.isfinite(ratio):
            return "calibrating"
        if self._safe_mode is not None and self._safe_mode.outside(ratio):
            return "out-of-band"
        return "low-entropy" if ratio < LOW else "high-entropy" if ratio > HIGH else "steady"

    def _watch_for_hand_over(self, ratio: float) -> None:
        if self.hand_over_below is None or self._handed_over:
            return
        if math.isfinite(ratio):
            self._low = self._low + 1 if ratio < self.hand_over_below else 0
        self._handed_over = self._low >= self.patience

    def _group_scales(self, entropies: tuple[float, ...]) -> tuple[float, ...]:
        if len(entropies) != len(self._groups):
            return ()
        for record, entropy in zip(self._groups, entropies):
            if math.isfinite(entropy):
                record.update(entropy)
        return tuple(MICRO_SCALE if record.ratio < MICRO_BELOW else 1.0 for record in self._groups)

    def rolled_back(self) -> None:
        """Disarms the safe mode for its cooldown, and compares only what comes now."""
        for record in (self._record, self._direction, *self._groups):
            record.restart()
        if self._safe_mode is not None:
            self._safe_mode.disarm()

    def state_dict(self) -> dict[str, Any]:
        """The entropy's record, target and integral, the plant, and where safe mode and hand-over stand."""
        return {
            "record": self._record.state_dict(),
            "direction": self._direction.state_dict(),
            "groups": [record.state_dict() for record in self._groups],
            "plant": self._plant.state_dict(),
            "safe_mode": self._safe_mode.state_dict() if self._safe_mode is not None else None,
            "integral": self._integral,
            "alpha": self._alpha,
            "low": self._low,
            "handed_over": self._handed_over,
            "last": brief(self._last),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self._record.load_state_dict(state["record"])
        self._direction.load_state_dict(state["direction"])
        if len(state["groups"]) == len(self._groups):  # else saved without `micro`, or by another set of groups
            for record, saved in zip(self._groups, state["groups"]):
                record.load_state_dict(saved)
        self._plant.load_state_dict(state["plant"])
        if self._safe_mode is not None and state["safe_mode"] is not None:
            self._safe_mode.load_state_dict(state["safe_mode"])
        self._integral, self._alpha = state["integral"], min(self._top, state["alpha"])
        self._last = unbrief(state["last"])
        self._low, self._handed_over = state["low"], state["handed_over"]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _checked_band(band: Any) -> tuple[float, float] | None:
    if band is None:
        return None
    pair = tuple(band) if isinstance(band, list | tuple) else ()
    if len(pair) != 2 or not all(_is_number(v) for v in pair) or not 0 <= pair[0] < 1 < pair[1]:
        raise ValueError(f"entropic.band: {band!r} must be (low, high) with 0 <= low < 1 < high, or None")
    return float(pair[0]), float(pair[1])
