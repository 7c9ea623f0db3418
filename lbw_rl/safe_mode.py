"""EntroPIC's safe mode: outside of a band updates pause, then the run goes back; bounded, cooled down, re-armed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lbw_rl.action import Directive


class SafeMode:
    """Watches a ratio that belongs in a band around 1.

    Outside of it `pause` decisions skip their update; if the ratio is still outside, one rollback is asked for. Then it is
    disarmed for `cooldown` decisions and until the ratio has been inside again, so that a run which never comes back is
    neither stopped for ever nor rolled back again and again. How often it may act at all is the authority's business.

    Args:
        band: (low, high) of the ratio, low < 1 < high.
        pause: decisions that skip before a rollback is asked for. Of several steps per decision only the first is skipped,
            and with late telemetry none.
        cooldown: decisions after it during which nothing is asked for.
    """

    def __init__(self, band: tuple[float, float], pause: int, cooldown: int) -> None:
        self.band, self.pause, self.cooldown = band, pause, cooldown
        self._skipped = 0  # in a row
        self._cooling = 0
        self._armed = True

    def __call__(self, ratio: float) -> Directive:
        """What to do with the step at hand; a ratio that is NaN says nothing and changes nothing."""
        outside = self.outside(ratio)
        if self._cooling:
            self._cooling -= 1
        elif not outside and math.isfinite(ratio):
            self._armed = True
        if not (outside and self._armed):
            self._skipped = 0
            return Directive.PROCEED
        if self._skipped < self.pause:
            self._skipped += 1
            return Directive.SKIP
        self.disarm()
        return Directive.ROLLBACK

    @property
    def armed(self) -> bool:
        """Whether leaving the band would be answered."""
        return self._armed

    def outside(self, ratio: float) -> bool:
        """Whether a ratio lies outside of the band; NaN does not."""
        return ratio < self.band[0] or ratio > self.band[1]

    def disarm(self) -> None:
        """Starts the cooldown: the run has just been rolled back."""
        self._skipped, self._cooling, self._armed = 0, self.cooldown, False

    def state_dict(self) -> dict[str, Any]:
        """Counters as JSON data."""
        return {"skipped": self._skipped, "cooling": self._cooling, "armed": self._armed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self._skipped, self._cooling, self._armed = state["skipped"], state["cooling"], state["armed"]
