"""A controller beside a device: what readings that have no bearing on a run do to what it decides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from lbw_rl.action import Action
from lbw_rl.controller import Context, Controller
from lbw_rl.envs.synthetic_device import SyntheticDevice
from lbw_rl.envs.tasks import WIDE
from lbw_rl.signals import Telemetry


class BesideADevice(Controller):
    """Passes telemetry on with made-up readings of a device, as policies have them in training: tiers have none.

    Args:
        controller: that decides.
    """

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.name, self.decide_every, self.time_limit = controller.name, controller.decide_every, controller.time_limit

    def reset(self, context: Context) -> None:
        """A device of its own for every run, drawn with the run's seed."""
        self._generator, self._device = np.random.default_rng([context.seed, 1]), SyntheticDevice(1)
        self._device.reset([0], [self._generator], [self._generator.uniform(*WIDE.dropout)])
        self.controller.reset(context)

    def act(self, telemetry: Telemetry) -> Action:
        """What the controller decides with them."""
        read = self._device.read([0], [self._generator])
        readings: dict[str, Any] = {name: float(value[0]) for name, value in read.items()}
        return self.controller.act(replace(telemetry, **readings))
