"""Made-up device telemetry for proxies that run on no device worth measuring."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

_SHARES = ("gpu_utilization", "gpu_memory", "gpu_power", "cpu_utilization", "host_memory")
_WALK = 0.15  # deviation of one decision's move, in logits or nats


class SyntheticDevice:
    """Device signals that walk at random and go missing at random, with no bearing on the run.

    A policy trained on them learns what is true of most runs: that the device says little about the learning
    rate, and may say nothing at all. Each run has its own source of randomness, levels, and set of sensors.
    """

    def __init__(self, n: int) -> None:
        self._walk = np.zeros((n, len(_SHARES) + 1))
        self._fitted = np.zeros((n, len(_SHARES) + 2), dtype=bool)
        self._seconds = np.ones(n)
        self._dropout = np.zeros(n)

    def reset(
        self, rows: Sequence[int], generators: Sequence[np.random.Generator], dropout: Sequence[float] | FloatArray
    ) -> None:
        """Draws new levels and sensors for the runs in `rows`, one generator each, and one share of lost readings."""
        self._dropout[rows] = dropout
        for row, rng in zip(rows, generators, strict=True):
            self._walk[row] = rng.normal(0.5, 1.5, self._walk.shape[1])
            self._fitted[row] = rng.random(self._fitted.shape[1]) < 0.5
            self._seconds[row] = np.exp(rng.uniform(-5.0, 1.0))

    def read(self, rows: Sequence[int], generators: Sequence[np.random.Generator]) -> dict[str, FloatArray]:
        """Signal name → readings of the runs in `rows`, shape (len(rows),); NaN where there is none."""
        seen = np.empty((len(rows), self._fitted.shape[1]), dtype=bool)
        for i, (row, rng) in enumerate(zip(rows, generators, strict=True)):
            self._walk[row] += _WALK * rng.standard_normal(self._walk.shape[1])
            seen[i] = self._fitted[row] & (rng.random(seen.shape[1]) > self._dropout[row])
        walk = self._walk[rows]
        seconds = self._seconds[rows] * np.exp(walk[:, -1])
        values = np.column_stack([1.0 / (1.0 + np.exp(-walk[:, :-1])), seconds, 1000.0 / seconds])
        names = (*_SHARES, "step_seconds", "tokens_per_second")
        return dict(zip(names, np.where(seen, values, np.nan).T, strict=True))
