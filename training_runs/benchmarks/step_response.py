"""What each gain of the rule-based controllers does: step responses on a plant that is exactly known.

```
python -m lbw_rl.training_runs.benchmarks.step_response docs/images/step-response.png
```

Needs matplotlib. The plant's update-to-weight ratio is gain × executed learning rate, as in SGD without momentum. Left and
middle: its gain rises tenfold at decision 20. Right: the element entropy falls from 0.70 to 0.57 at decision 20 and comes
back at decision 80. The controllers and the authority are the real ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from lbw_rl.authority import Authority
from lbw_rl.controller import Context, Controller
from lbw_rl.controllers.entropic import EntroPIC
from lbw_rl.controllers.lbw_guard import LBWGuard
from lbw_rl.controllers.pid import PID
from lbw_rl.enforcer import Enforcer
from lbw_rl.setpoint import ratio_level
from lbw_rl.signals import NAN, Telemetry

STEPS = 100_000
"""Planned steps: so many that the set-point's own shape does not show."""
AUTHORITY = Authority(lr_scale=(1e-3, 100.0), slew_up=1.5)
RATE = 1e-3
SPREAD, CONCENTRATED = 0.70, 0.57
"""Element entropies of a healthy run, and of one whose set-point is too high (docs/entropy.md)."""

Disturbance = Callable[[int], tuple[float, float]]
"""Decision → (plant gain, element entropy)."""


def gain_step(decision: int) -> tuple[float, float]:
    """The plant answers ten times as strongly from decision 20 on."""
    return (1.0 if decision < 20 else 10.0), SPREAD


def entropy_step(decision: int) -> tuple[float, float]:
    """The energy concentrates from decision 20 to 79."""
    return 1.0, (CONCENTRATED if 20 <= decision < 80 else SPREAD)


def respond(controller: Controller, disturbance: Disturbance, decisions: int = 140) -> list[float]:
    """Executed update-to-weight ratios over the undisturbed set-point, one per decision.

    Args:
        controller: fresh; it is reset.
        disturbance: what the plant does.
        decisions: how many.
    """
    controller.reset(Context(total_steps=STEPS, authority=AUTHORITY))
    enforcer, level = Enforcer(AUTHORITY), ratio_level(STEPS)
    base = level / RATE  # the scheduled rate is right at the plant gain of before
    scale, ratio, answers = 1.0, NAN, []
    for decision in range(decisions):
        gain, entropy = disturbance(decision)
        telemetry = Telemetry(
            step=float(decision),
            progress=decision / STEPS,
            learning_rate=RATE,
            lr_scale=scale,
            update_ratio=ratio,
            loss=1.0,
            grad_norm=1.0,
            nonfinite=0.0,
            surprise=1.0,
            grad_entropy_element=entropy,
            grad_entropy_direction=0.995,
        )
        scale = enforcer.rule(controller.act(telemetry)).action.lr_scale
        ratio = gain * base * RATE * scale
        answers.append(ratio / level)
    return answers


def draw(target: Path) -> None:
    """Writes the picture."""
    import matplotlib.pyplot as plt

    setpoint = ratio_level(STEPS)
    pids = {f"Ki {ki:g}, Kp {kp:g}": PID(setpoint=setpoint, ki=ki, kp=kp) for ki, kp in _PID_GAINS}
    guards = {f"half-life {h:g}": LBWGuard(half_life=h) for h in (0.5, 2.0, 8.0)}
    entropics = {f"Kp {kp:g}, Ki {ki:g}": EntroPIC(kp=kp, ki=ki) for kp, ki in ((4, 0), (4, 0.2), (1, 0.2), (1, 0.05))}
    panels: list[tuple[str, dict[str, Controller], Disturbance, tuple[int, int]]] = [
        ("pid: plant gain × 10", {**pids}, gain_step, (15, 50)),
        ("lbw-guard: plant gain × 10", {**guards}, gain_step, (15, 50)),
        ("entropic: entropy 0.70 → 0.57 → 0.70", {**entropics}, entropy_step, (10, 140)),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 3.6), dpi=130)
    for (title, controllers, disturbance, (first, last)), ax in zip(panels, axes):
        for label, controller in controllers.items():
            ax.plot(range(first, last), respond(controller, disturbance, last)[first:], marker=".", ms=3, label=label)
        ax.set(title=title, xlabel="decision", yscale="log")
        ax.axhline(1.0, color="#999999", lw=0.8)
        ax.grid(alpha=0.3, which="both")
        ax.legend(fontsize=8)
    axes[0].set_ylabel("update-to-weight ratio / set-point")
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


_PID_GAINS = ((0.1, 0.1), (0.3, 0.1), (1.0, 0.0), (1.0, 0.9))


def main() -> None:
    """Draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="picture to write")
    draw(parser.parse_args().target)


if __name__ == "__main__":
    main()
