"""The plant that the controllers of the update ratio are tried on, with analytic answers."""

import math

from lbw_rl import Context, Telemetry
from lbw_rl.enforcer import Enforcer


class RatioPlant:
    """A run whose update-to-weight ratio is gain · rate · executed scale."""

    def __init__(self, controller, authority, gain, learning_rate=1e-3, steps=200):
        controller.reset(Context(total_steps=steps, authority=authority))
        self.controller, self.enforcer, self.gain = controller, Enforcer(authority), gain
        self.learning_rate, self.scale, self.steps, self.step = learning_rate, 1.0, steps, 0

    def decide(self, loss=5.0, **signals):
        """One decision; returns the ratio that the executed scale gives."""
        ratio = self.gain * self.learning_rate * self.scale if self.step else math.nan
        telemetry = Telemetry(
            progress=self.step / self.steps,
            learning_rate=self.learning_rate,
            lr_scale=self.scale,
            update_ratio=ratio,
            loss=loss,
            nonfinite=0.0,
            grad_norm=1.0,
            surprise=1.0,
        )
        self.proposed = self.controller.act(Telemetry(**{**telemetry.as_dict(), **signals}))
        self.scale = self.enforcer.rule(self.proposed).action.lr_scale
        self.step += 1
        return self.gain * self.learning_rate * self.scale
