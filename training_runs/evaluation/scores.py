"""What the final losses of a tier say: interquartile means, how often one is better, how flat the axis is.

Figures and intervals follow Agarwal et al. 2108.13264: the mean of the middle half of all runs, which a few lost runs do not
move, and bootstrap intervals over what a repetition would draw anew: policies, tasks, and the seeds of each task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import trim_mean

FloatArray = NDArray[np.float64]

RESAMPLES = 2000
PROFILE = tuple(np.round(np.arange(-0.5, 1.01, 0.05), 2).tolist())
"""Log-perplexity ratios at which a performance profile is read."""


def iqm(values: FloatArray) -> float:
    """Mean of the middle half of `values`, of any shape."""
    return float(trim_mean(values.reshape(-1), 0.25))


def score(
    losses: Mapping[str, FloatArray], diverged: Mapping[str, NDArray[np.bool_]], reference: str
) -> dict[str, Any]:
    """All figures of one tier.

    Args:
        losses: arm → final losses in nats per token, shape (policies, tasks, multipliers, seeds), where all but learned arms have
            one policy.
        diverged: arm → which runs diverged, of the same shapes.
        reference: the arm that ratios are to.

    Returns:
        JSON data, a dict an arm: `iqm`, of the log-perplexity ratio to the reference, with its `interval`; `median_ppl`;
        `lr_sensitivity` in nats (Wortsman et al. 2309.14322); `diverged`, a share; `profile`, the share of runs with a ratio of
        at most each of `PROFILE`; and `against`, by other arm: `iqm` of the paired difference in loss (negative is better) with
        its interval, and `improves`, the probability of a lower loss, ties halved, with its interval.
    """
    return {arm: _of_arm(arm, losses, diverged[arm], reference) for arm in losses}


def _of_arm(arm: str, losses: Mapping[str, FloatArray], diverged: NDArray[np.bool_], reference: str) -> dict[str, Any]:
    mine = losses[arm]
    ratio = mine - losses[reference]
    point = _with_interval({"iqm": (iqm, ratio)})
    against = {
        other: _with_interval({"iqm": (iqm, mine - theirs), "improves": (_improves, mine - theirs)})
        for other, theirs in losses.items()
        if other != arm and len(theirs) == 1
    }
    return {
        **point,
        "median_ppl": float(np.exp(np.median(mine))),
        "lr_sensitivity": float((mine - mine.min(axis=2, keepdims=True)).mean()),
        "diverged": float(diverged.mean()),
        "profile": [float((ratio <= tau).mean()) for tau in PROFILE],
        "against": against,
    }


def _improves(differences: FloatArray) -> float:
    return float((differences < 0).mean() + (differences == 0).mean() / 2)


def _with_interval(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Each figure and its 95 % interval: name → value, name + "_interval" → (low, high)."""
    rng = np.random.default_rng(0)
    some = next(iter(figures.values()))[1]
    policies, tasks, _, seeds = some.shape
    drawn: dict[str, list[float]] = {name: [] for name in figures}
    for _ in range(RESAMPLES):
        p = rng.integers(0, policies, policies)
        t = rng.integers(0, tasks, tasks)
        s = rng.integers(0, seeds, (tasks, seeds))
        for name, (figure, values) in figures.items():
            drawn[name].append(figure(values[p[:, None, None], t[None, :, None], :, s[None]]))
    found: dict[str, Any] = {}
    for name, (figure, values) in figures.items():
        low, high = np.quantile(drawn[name], [0.025, 0.975])
        found |= {name: figure(values), f"{name}_interval": [float(low), float(high)]}
    return found
