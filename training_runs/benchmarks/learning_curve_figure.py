"""Draws the learning curves of several seeds of one policy training.

```
python -m lbw_rl.training_runs.benchmarks.learning_curve_figure policy-0 policy-1 … --target docs/images/learning-curve.png
```

Needs matplotlib. A thin line is a seed, the thick one their mean, with its 95 % interval where there are three or more.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lbw_rl.training_runs.intervals import difference_interval
from lbw_rl.training_runs.ppo_session import CURVE_FILE


def curves(folders: Sequence[Path]) -> tuple[list[float], np.ndarray]:
    """Decisions of the points that all curves have, shape (k,), and gains in nats per token, shape (folders, k).

    A point is what trials told, judged on fresh proxies (`gain`), or the mean return of a rollout of PPO (`return_mean`).

    Raises:
        ValueError: a folder without a curve, or curves without a common point.
    """
    found: list[dict[float, float]] = []
    for folder in folders:
        path = folder / CURVE_FILE
        if not path.is_file():
            raise ValueError(
                f"folders: {folder} has no {CURVE_FILE}; accepted: what `lbw-rl train-policy --out FOLDER` wrote"
            )
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        gains = {line["decisions"]: line.get("gain", line.get("return_mean")) for line in lines}
        found.append({at: gain for at, gain in gains.items() if gain is not None})
    common = sorted(set.intersection(*(set(curve) for curve in found)))
    if not common:
        raise ValueError(f"folders: the curves of {len(folders)} trainings have no point in common")
    return common, np.array([[curve[at] for at in common] for curve in found])


def draw(folders: Sequence[Path], target: Path) -> None:
    """Writes the picture; raises what `curves` does."""
    import matplotlib.pyplot as plt

    decisions, gains = curves(folders)
    figure, axes = plt.subplots(figsize=(6.4, 4.0), dpi=140)
    thousands = np.array(decisions) / 1000
    for folder, gain in zip(folders, gains, strict=True):
        axes.plot(thousands, gain, marker="o", ms=3, lw=0.9, alpha=0.7, label=folder.name)
    middle = gains.mean(0)
    axes.plot(thousands, middle, color="#111111", lw=2.4, label=f"mean of {len(folders)}")
    if len(folders) > 2:
        intervals = [difference_interval(list(column)) or (m, m) for column, m in zip(gains.T, middle, strict=True)]
        low, high = zip(*intervals, strict=True)
        axes.fill_between(thousands, low, high, color="#111111", alpha=0.12, lw=0)
    axes.axhline(0.0, color="#7f7f7f", lw=1.0, ls="--")
    axes.set(xlabel="decisions of training, thousands", ylabel="held-out gain over the base run, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    plt.close(figure)


def main() -> None:
    """Reads the curves and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of trainings, a seed each")
    parser.add_argument("--target", type=Path, required=True, help="picture to write")
    args = parser.parse_args()
    try:
        draw(args.folders, args.target)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
