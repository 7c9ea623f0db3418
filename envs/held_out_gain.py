"""The reward of both environments: how much better than its base run a governed run does on held-out text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Mask = NDArray[np.bool_]

DIVERGED_FACTOR = 1.5
DIVERGED_DECISIONS = 8


class DivergenceWatch:
    """Which of n runs have diverged: once and for all.

    A run has diverged when its training or held-out loss is not finite, or when its held-out loss has been
    above `DIVERGED_FACTOR` times its initial value for `DIVERGED_DECISIONS` decisions in a row.
    """

    def __init__(self, n: int) -> None:
        self._above = np.zeros(n, dtype=np.int64)
        self._diverged = np.zeros(n, dtype=bool)

    def reset(self, rows: Sequence[int]) -> None:
        """Forgets the runs in `rows`."""
        self._above[rows] = 0
        self._diverged[rows] = False

    def __call__(self, training: FloatArray, held_out: FloatArray, initial: FloatArray) -> Mask:
        """Takes in one decision's training and held-out losses, shape (n,) each; returns who has diverged."""
        self._above = np.where(held_out > DIVERGED_FACTOR * initial, self._above + 1, 0)
        self._diverged |= ~(np.isfinite(training) & np.isfinite(held_out)) | (self._above >= DIVERGED_DECISIONS)
        return self._diverged.copy()


class HeldOutGain:
    """Turns held-out losses into rewards that telescope.

    The gain is G = L_base − L_governed in nats per token. Each loss counts as min(loss, initial loss), and one
    of a diverged run as the initial loss (as in the learning-rate sensitivity of Wortsman et al. 2309.14322).
    A reward is the change of G since the decision before, so that the undiscounted return of a run is its final
    G; it starts from 0, since both runs start from the same weights.

    Attributes:
        initial: held-out losses of the untrained models, shape (n,).
        gain: G after the last decision, shape (n,).
    """

    def __init__(self, n: int) -> None:
        self.initial = np.zeros(n)
        self.gain = np.zeros(n)

    def reset(self, rows: Sequence[int], initial: FloatArray) -> None:
        """Starts the runs in `rows` at their initial losses, shape (len(rows),)."""
        self.initial[rows] = initial
        self.gain[rows] = 0.0

    def rewards(
        self, governed: FloatArray, governed_diverged: Mask, base: FloatArray, base_diverged: Mask
    ) -> FloatArray:
        """Takes in one decision's held-out losses; all arrays have shape (n,)."""
        gain = self._counted(base, base_diverged) - self._counted(governed, governed_diverged)
        rewards, self.gain = gain - self.gain, gain
        return rewards

    def _counted(self, losses: FloatArray, diverged: Mask) -> FloatArray:
        lost = diverged | ~np.isfinite(losses)
        return np.where(lost, self.initial, np.minimum(losses, self.initial))
