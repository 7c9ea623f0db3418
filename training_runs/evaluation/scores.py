"""What the final losses of a tier say: interquartile means, how often one is better, how flat the axis is.

Figures and intervals follow Agarwal et al. 2108.13264: the mean of the middle half of all runs, which a few lost runs do not
move, and bootstrap intervals over what a repetition would draw anew: policies, tasks, and the seeds of each task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import trim_mean

FloatArray = NDArray[np.float64]

RESAMPLES = 2000
PROFILE = tuple(np.round(np.arange(-0.5, 1.01, 0.05), 2).tolist())
"""Log-perplexity ratios at which a performance profile is read."""


def score(
    losses: Mapping[str, FloatArray], diverged: Mapping[str, NDArray[np.bool_]], reference: str, subject: str
) -> dict[str, Any]:
    """All figures of one tier.

    Args:
        losses: arm → final losses in nats per token, shape (policies, tasks, multipliers, seeds), where all but the subject have
            one policy.
        diverged: arm → which runs diverged, of the same shapes.
        reference: the arm that ratios are to.
        subject: the arm that is held against each of the others.

    Returns:
        JSON data, a dict an arm: `iqm`, of the log-perplexity ratio to the reference, with its `iqm_interval`; `median_ppl`;
        `lr_sensitivity` in nats (Wortsman et al. 2309.14322); `diverged`, a share; and `profile`, the share of runs with a ratio of
        at most each of `PROFILE`. The subject's has `against` as well, by other arm: `iqm` of the paired difference in loss
        (negative is better), and `improves`, the probability of a lower loss, ties halved, each with its interval.
    """
    found = {}
    for arm, mine in losses.items():
        ratio = mine - losses[reference]
        found[arm] = {
            **_with_interval({"iqm": _iqms}, ratio),
            "median_ppl": float(np.exp(np.median(mine))),
            "lr_sensitivity": float((mine - mine.min(axis=2, keepdims=True)).mean()),
            "diverged": float(diverged[arm].mean()),
            "profile": [float((ratio <= tau).mean()) for tau in PROFILE],
        }
    found[subject]["against"] = {
        other: _with_interval({"iqm": _iqms, "improves": _improves}, losses[subject] - theirs)
        for other, theirs in losses.items()
        if other != subject
    }
    return found


def _improves(differences: FloatArray) -> FloatArray:
    return (differences < 0).mean(axis=-1) + (differences == 0).mean(axis=-1) / 2


def _iqms(values: FloatArray) -> FloatArray:
    return np.asarray(trim_mean(values, 0.25, axis=-1))


def _with_interval(figures: Mapping[str, Callable[[FloatArray], FloatArray]], values: FloatArray) -> dict[str, Any]:
    """Each figure of `values`, shape (policies, tasks, multipliers, seeds), and its 95 % interval.

    Args:
        figures: name → function of runs of shape (…, n), to (…).

    Returns:
        name → value, and name + "_interval" → [low, high].
    """
    rng = np.random.default_rng(0)
    policies, tasks, _, seeds = values.shape
    p = rng.integers(0, policies, (RESAMPLES, policies))
    t = rng.integers(0, tasks, (RESAMPLES, tasks))
    s = rng.integers(0, seeds, (RESAMPLES, tasks, seeds))
    drawn = values[p[:, :, None, None], t[:, None, :, None], :, s[:, None]].reshape(RESAMPLES, -1)
    found: dict[str, Any] = {}
    for name, figure in figures.items():
        low, high = np.quantile(figure(drawn), [0.025, 0.975])
        found |= {name: float(figure(values.reshape(-1))), f"{name}_interval": [float(low), float(high)]}
    return found
