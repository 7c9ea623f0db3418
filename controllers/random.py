"""Random actions: the control that every learned policy has to beat."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from lbw_rl.action import Action, log_interpolate
from lbw_rl.controller import Context, Controller
from lbw_rl.signals import Telemetry


class RandomActions(Controller):
    """Draws both scales log-uniformly from the authority at every decision, reproducibly from the run's seed."""

    name = "random"
    time_limit = None

    def __init__(self) -> None:
        self._context = Context()
        self._random = random.Random(0)

    def reset(self, context: Context) -> None:
        """Reseeds from the context."""
        self._context = context
        self._random = random.Random(context.seed)

    def act(self, telemetry: Telemetry) -> Action:
        """The next draw; the telemetry is not read."""
        authority = self._context.authority
        return Action(
            lr_scale=log_interpolate(self._random.uniform(-1, 1), authority.lr_scale),
            momentum_scale=log_interpolate(self._random.uniform(-1, 1), authority.momentum_scale),
            regime="random",
        )

    def state_dict(self) -> dict[str, Any]:
        """The generator's state."""
        version, internal, gauss = self._random.getstate()
        return {"version": version, "internal": list(internal), "gauss": gauss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the generator."""
        self._random.setstate((state["version"], tuple(state["internal"]), state["gauss"]))
