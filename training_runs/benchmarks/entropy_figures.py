"""The pictures of the entropy study. Needs matplotlib."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from lbw_rl.entropy import ESTIMATORS
from lbw_rl.training_runs.benchmarks.entropy_study import REGIMES


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes two pictures: each estimator over the runs of the first case, and the AUC of all cases.

    Args:
        results: what `entropy_study.study` returned.
        folder: where to; it is made.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    case = results["summary"][0]["case"]
    colours = dict(zip(REGIMES, ("#111111", "#0072B2", "#D55E00", "#CC79A7", "#009E73")))
    figure, axes = plt.subplots(1, len(ESTIMATORS), figsize=(3.1 * len(ESTIMATORS), 3.2), dpi=130)
    for estimator, ax in zip(ESTIMATORS, axes):
        for regime, colour in colours.items():
            runs = [r["entropy"][estimator] for r in results["rows"] if (r["case"], r["regime"]) == (case, regime)]
            values = np.array([[math.nan if v is None else v for v in run] for run in runs])
            with warnings.catch_warnings():  # a step that no run has measured
                warnings.simplefilter("ignore", RuntimeWarning)
                middle, low, high = np.nanmedian(values, 0), np.nanmin(values, 0), np.nanmax(values, 0)
            ax.plot(middle, color=colour, lw=1, label=regime)
            ax.fill_between(np.arange(middle.size), low, high, color=colour, alpha=0.15, lw=0)
        ax.set(title=estimator, xlabel="step")
        ax.ticklabel_format(useOffset=False)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("normalised entropy")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"{case}: median and range of {results['settings']['seeds']} seeds")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(folder / "entropy-runs.png")
    plt.close(figure)

    regimes = [r for r in REGIMES if r != "healthy"]
    cases = list(dict.fromkeys(e["case"] for e in results["summary"]))
    figure, axes = plt.subplots(1, len(cases), figsize=(3.4 * len(cases), 3.2), dpi=130, sharey=True, squeeze=False)
    for name, ax in zip(cases, axes[0]):
        own = [e for e in results["summary"] if e["case"] == name]
        values = np.array([[e["auc"][r] for r in regimes] for e in own])
        ax.imshow(values, vmin=0, vmax=1, cmap="RdBu")
        for i, j in np.ndindex(values.shape):
            strong = abs(values[i, j] - 0.5) > 0.35
            ax.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", color="white" if strong else "black")
        ax.set(title=f"{name} ({own[0]['parameters'] / 1e3:,.0f}k)")
        ax.set_xticks(range(len(regimes)), regimes, rotation=30, ha="right")
        ax.set_yticks(range(len(own)), [e["estimator"] for e in own])
    figure.suptitle("AUC against the healthy run: 0.5 is blind, 0 and 1 are told apart by one threshold")
    figure.tight_layout()
    figure.savefig(folder / "entropy-auc.png")
    plt.close(figure)
    return [folder / "entropy-runs.png", folder / "entropy-auc.png"]
