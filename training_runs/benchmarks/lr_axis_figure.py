"""Draws the README's picture from the results of a comparison or a stress suite.

```
python -m lbw_rl.training_runs.benchmarks.lr_axis_figure FOLDER docs/images/lr-axis.png --arms "AdamW, tuned;LBW-Guard-style"
```

Needs matplotlib. A panel is a family of runs, a point the median over seeds of the final held-out loss, a bar its range.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

from lbw_rl.training_runs.results import Row, read_results

COLOURS = ("#111111", "#7f7f7f", "#0072B2", "#CC79A7", "#009E73", "#E69F00", "#56B4E9", "#8B5A2B")
GOVERNED = "#D55E00"
"""Of the last arm, drawn thicker and over the others."""


def draw(rows: list[Row], target: Path, families: list[str], arms: list[str]) -> None:
    """Writes one panel per family, with the arms that have runs in it.

    Raises:
        ValueError: a family or an arm of which there is no run.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter

    for name, asked, known in (
        ("families", families, {r.recipe for r in rows}),
        ("arms", arms, {r.arm for r in rows}),
    ):
        if unknown := sorted(set(asked) - known):
            raise ValueError(f"{name}: no run of {unknown[0]!r}; accepted: {', '.join(sorted(known))}")
    figure, panels = plt.subplots(1, len(families), figsize=(4.6 * len(families), 4.2), dpi=140, squeeze=False)
    for axes, family in zip(panels[0], families):
        for arm, colour in zip(arms, [*COLOURS[: len(arms) - 1], GOVERNED]):
            mine = [r for r in rows if r.recipe == family and r.arm == arm]
            if not mine:
                continue
            points = sorted({row.lr_multiplier for row in mine})
            losses = [[r.final_loss for r in mine if r.lr_multiplier == m] for m in points]
            middle = [median(x) for x in losses]
            spread = [[m - min(x) for m, x in zip(middle, losses)], [max(x) - m for m, x in zip(middle, losses)]]
            width = 2.4 if colour == GOVERNED else 1.2
            axes.errorbar(points, middle, spread, color=colour, marker="o", ms=4, lw=width, capsize=2, label=arm)
        axes.set(xscale="log", title=family, xlabel="learning rate, × the base rate")
        ticks = sorted({row.lr_multiplier for row in rows if row.recipe == family})
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(FuncFormatter(_multiple))
        axes.xaxis.set_minor_locator(FixedLocator([]))
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("final held-out loss, nats per token")
    handles = {label: h for axes in panels[0] for h, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=min(len(handles), 5), fontsize=8)
    figure.tight_layout(rect=(0, 0.06 * (1 + (len(handles) - 1) // 5), 1, 1))
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


def _multiple(value: float, _: int) -> str:
    return f"{value:g}" if value >= 1 else f"1/{1 / value:.0f}"


def main() -> None:
    """Reads the results and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with results.json")
    parser.add_argument("target", type=Path, help="picture to write")
    parser.add_argument("--families", help="separated by semicolons; default: all")
    parser.add_argument("--arms", help="separated by semicolons, the governed one last; default: all")
    args = parser.parse_args()
    rows = read_results(args.folder).rows
    families = args.families.split(";") if args.families else list(dict.fromkeys(row.recipe for row in rows))
    arms = args.arms.split(";") if args.arms else list(dict.fromkeys(row.arm for row in rows))
    draw(rows, args.target, families, arms)


if __name__ == "__main__":
    main()
