"""Draws the README's picture from the results of comparisons and stress suites.

```
python -m lbw_rl.training_runs.benchmarks.lr_axis_figure stress deployed docs/images/lr-axis.png --arms "AdamW, tuned;LBW-Guard-style"
```

Needs matplotlib. A panel is a family of runs, a point the median over seeds of the final held-out loss, a bar its range.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import median

from lbw_rl.training_runs.results import Row, read_results

COLOURS = ("#111111", "#7f7f7f", "#B39DDB", "#CC79A7", "#009E73", "#E69F00", "#56B4E9", "#8B5A2B")
GOVERNED = ("#D55E00", "#0072B2")
"""Of the last arms, drawn thicker and over the others."""


def draw(rows: list[Row], target: Path, families: list[str], arms: list[str], governed: int = 1) -> None:
    """Writes one panel per family, with the arms that have runs in it; the last `governed` of them are drawn thicker.

    Raises:
        ValueError: a family or an arm of which there is no run, or more arms than colours.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter

    for name, asked, known in (
        ("families", families, {r.recipe for r in rows}),
        ("arms", arms, {r.arm for r in rows}),
    ):
        if unknown := sorted(set(asked) - known):
            raise ValueError(f"{name}: no run of {unknown[0]!r}; accepted: {', '.join(sorted(known))}")
    if len(arms) > (most := len(COLOURS) + governed):
        raise ValueError(f"arms: {len(arms)} of them; accepted: at most {most}, chosen with --arms")
    n = len(families)
    columns, lines = (n, 1) if n <= 3 else (math.ceil(n / 2), 2)
    figure, panels = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 4.2 * lines), dpi=140, squeeze=False, layout="constrained"
    )
    for axes, family in zip(panels.flat, families):
        for arm, colour in zip(arms, [*COLOURS[: len(arms) - governed], *GOVERNED[:governed]], strict=True):
            mine = [r for r in rows if r.recipe == family and r.arm == arm]
            if not mine:
                continue
            points = sorted({row.lr_multiplier for row in mine})
            losses = [[r.final_loss for r in mine if r.lr_multiplier == m] for m in points]
            middle = [median(x) for x in losses]
            spread = [[m - min(x) for m, x in zip(middle, losses)], [max(x) - m for m, x in zip(middle, losses)]]
            width = 2.4 if colour in GOVERNED else 1.2
            axes.errorbar(points, middle, spread, color=colour, marker="o", ms=4, lw=width, capsize=2, label=arm)
        axes.set(xscale="log", title=family, xlabel="learning rate, × the base rate")
        ticks = sorted({row.lr_multiplier for row in rows if row.recipe == family})
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(FuncFormatter(_multiple))
        axes.xaxis.set_minor_locator(FixedLocator([]))
        axes.grid(alpha=0.3)
    for axes in panels.flat[n:]:
        axes.axis("off")
    for axes in panels[:, 0]:
        axes.set_ylabel("final held-out loss, nats per token")
    handles = {label: h for axes in panels.flat for h, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=min(n + 1, 5), fontsize=8)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


def _multiple(value: float, _: int) -> str:
    return f"{value:g}" if value >= 1 else f"1/{1 / value:.0f}"


def main() -> None:
    """Reads the results and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results.json, its folder, or a .parquet of rows")
    parser.add_argument("target", type=Path, help="picture to write")
    parser.add_argument("--families", help="separated by semicolons; default: all")
    parser.add_argument("--arms", help="separated by semicolons, the governed ones last; default: all")
    parser.add_argument("--governed", type=int, choices=(1, 2), default=1, help="how many of them (default: 1)")
    args = parser.parse_args()
    rows = [row for path in args.results for row in read_results(path).rows]
    families = args.families.split(";") if args.families else list(dict.fromkeys(row.recipe for row in rows))
    arms = args.arms.split(";") if args.arms else list(dict.fromkeys(row.arm for row in rows))
    draw(rows, args.target, families, arms, args.governed)


if __name__ == "__main__":
    main()
