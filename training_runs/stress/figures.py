"""The suite's figure: a panel a family, final loss against the learning-rate multiplier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from lbw_rl.training_runs.report_figures import ArmStyle, Panel, level_rule, level_text, make_panel, multiplier_label
from lbw_rl.training_runs.results import Row
from lbw_rl.training_runs.summary import capped


def axis_panel(id: str, title: str, rows: Sequence[Row], styles: Mapping[str, ArmStyle], tuned: float) -> Panel:
    """One family: a line an arm through the means over seeds, a thin marker a seed.

    Args:
        id: element id.
        title: the family's name.
        rows: its runs.
        styles: how arms are drawn.
        tuned: final loss of the tuned baseline, nats per token; a line of its own.
    """
    traces = []
    for arm, style in styles.items():
        mine = [row for row in rows if row.arm == arm]
        multipliers = sorted({row.lr_multiplier for row in mine})
        if not mine:
            continue
        at = [[row for row in mine if row.lr_multiplier == m] for m in multipliers]
        traces.append(
            go.Scatter(
                x=multipliers,
                y=[fmean(capped(row) for row in cell) for cell in at],
                name=escape(arm),
                meta=arm,
                mode="lines+markers",
                line={"color": style.colour, "dash": style.dash, "width": style.width},
                marker={"size": 7, "symbol": ["x" if any(r.diverged for r in cell) else style.symbol for cell in at]},
                customdata=[f"{sum(r.diverged for r in cell)} of {len(cell)} diverged" for cell in at],
                hovertemplate="%{x:.3g}× · %{y:.3f} nats<br>%{customdata}",
            )
        )
        if any(len(cell) > 1 for cell in at):
            traces.append(
                go.Scatter(
                    x=[row.lr_multiplier for row in mine],
                    y=[capped(row) for row in mine],
                    name=escape(arm),
                    meta=arm,
                    mode="markers",
                    marker={"size": 7, "symbol": "line-ew-open", "color": style.colour, "line": {"width": 1}},
                    customdata=[row.seed for row in mine],
                    hovertemplate="%{x:.3g}× · %{y:.3f} nats<br>seed %{customdata}",
                )
            )
    return make_panel(id, traces, _layout(rows, tuned), f"Line chart: final held-out loss on {title}", title, 340)


def _layout(rows: Sequence[Row], tuned: float) -> dict[str, Any]:
    multipliers = sorted({row.lr_multiplier for row in rows})
    return {
        "xaxis": {
            "type": "log",
            "title": {"text": "learning-rate multiplier"},
            "tickvals": multipliers,
            "ticktext": [multiplier_label(m).removesuffix("×") for m in multipliers],
            "minor": {"ticks": ""},
        },
        "yaxis": {"title": {"text": "held-out loss, nats per token"}},
        "shapes": [level_rule(tuned)],
        "annotations": [level_text(tuned, "tuned<br>AdamW")],
        "margin": {"l": 52, "r": 58, "t": 8, "b": 44},
    }
