"""95 % intervals of a mean over seeds, and what a paired difference lets one say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
Interval = tuple[float, float]


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Bootstrap interval (BCa, 9999 resamples, fixed seed) of the mean of `values`, shape (n,).

    Returns `None` where resampling says nothing: fewer than two values, or all of them equal. With three
    or four values it is hardly wider than their range, so it shows the spread and proves little.
    Source: Efron 1987, "Better bootstrap confidence intervals", as `scipy.stats.bootstrap` computes it.
    """
    if not _has_spread(values):
        return None
    from scipy.stats import bootstrap

    result = bootstrap((np.asarray(values),), np.mean, confidence_level=CONFIDENCE, rng=np.random.default_rng(0))
    low, high = (float(v) for v in result.confidence_interval)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def seed_interval(losses: NDArray[np.float64], figure: Callable[[NDArray[np.float64]], Any]) -> Interval | None:
    """Bootstrap interval over seeds of a figure of the mean loss of several cells, which the seeds share.

    Whole seeds are drawn, so what is paired by seed stays paired. Otherwise as `mean_interval`.

    Args:
        losses: shape (seeds, cells).
        figure: mean losses, shape (…, cells), to the figure, shape (…).
    """
    if not _has_spread([float(figure(of_seed)) for of_seed in losses]):
        return None
    from scipy.stats import bootstrap

    def of_drawn(seeds: NDArray[Any], axis: int = -1) -> Any:
        return figure(losses[seeds.astype(int)].mean(axis=-2))

    result = bootstrap(
        (np.arange(len(losses)),), of_drawn, confidence_level=CONFIDENCE, vectorized=True, rng=np.random.default_rng(0)
    )
    low, high = (float(v) for v in result.confidence_interval)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def difference_interval(differences: Sequence[float]) -> Interval | None:
    """Student's t interval of the mean of paired `differences`, shape (n,).

    Wider than the bootstrap's at the few seeds that a comparison can afford, and of the stated coverage
    there, which is why statements of better and worse rest on it. `None` as in `mean_interval`.
    """
    if not _has_spread(differences):
        return None
    from scipy.stats import ttest_1samp

    interval = ttest_1samp(np.asarray(differences), 0.0).confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high)


def judge(differences: Sequence[float]) -> dict[str, object]:
    """What paired differences in loss (nats; negative is better) support.

    Returns a dict with `n`, `ratio` (of perplexities, exp of the mean difference; `None` without pairs),
    `interval` (of that ratio, or `None`) and `verdict`: `better` or `worse` when the interval lies wholly
    on one side of 1, `unresolved` when it does not, `no interval` when there is none.
    """
    if not len(differences):
        return {"n": 0, "ratio": None, "interval": None, "verdict": "no interval"}
    ratio = math.exp(float(np.mean(differences)))
    interval = difference_interval(differences)
    if interval is None:
        return {"n": len(differences), "ratio": ratio, "interval": None, "verdict": "no interval"}
    low, high = interval
    verdict = "better" if high < 0 else "worse" if low > 0 else "unresolved"
    bounds = [math.exp(max(low, -700.0)), math.exp(min(high, 700.0))]
    return {"n": len(differences), "ratio": ratio, "interval": bounds, "verdict": verdict}


def _has_spread(values: Sequence[float]) -> bool:
    # Equal up to rounding counts as equal: a spread of one ulp would yield an interval of false precision.
    return len(values) >= 2 and float(np.ptp(values)) > 1e-9 * max(1.0, float(np.max(np.abs(values))))
