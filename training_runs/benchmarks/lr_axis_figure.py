"""Draws the README's picture from a comparison's results.

```
python -m lbw_rl.training_runs.benchmarks.lr_axis_figure COMPARISON docs/images/lr-axis.png
```

Needs matplotlib. A point is the median over seeds of the final held-out loss, a bar its range; an arm is one line.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

from lbw_rl.training_runs.results import Row, read_results

COLOURS = ("#7f7f7f", "#111111", "#0072B2", "#CC79A7", "#009E73", "#D55E00", "#E69F00", "#56B4E9")


def draw(rows: list[Row], target: Path) -> None:
    """Writes the picture of one recipe's rows."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), dpi=140)
    for arm, colour in zip(dict.fromkeys(row.arm for row in rows), COLOURS):
        points = sorted({row.lr_multiplier for row in rows if row.arm == arm})
        losses = [[r.final_loss for r in rows if r.arm == arm and r.lr_multiplier == m] for m in points]
        middle = [median(x) for x in losses]
        spread = [[m - min(x) for m, x in zip(middle, losses)], [max(x) - m for m, x in zip(middle, losses)]]
        axes.errorbar(points, middle, spread, color=colour, marker="o", capsize=3, label=arm)
    seeds = len({row.seed for row in rows})
    axes.set(
        xscale="log",
        xlabel="multiple of the recipe's learning rate",
        ylabel="final held-out loss (nats/token)",
        title=f"{rows[0].recipe}: median and range of {seeds} seeds",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


def main() -> None:
    """Reads a comparison and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="folder with results.json")
    parser.add_argument("target", type=Path, help="picture to write")
    args = parser.parse_args()
    draw(read_results(args.comparison).rows, args.target)


if __name__ == "__main__":
    main()
