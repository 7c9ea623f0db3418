"""The report's figures, as plotly specifications that the page themes and draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from lbw_rl.training_runs.report_data import Curve, Decisions, Metrics

REFERENCE_COLOUR = "#7d8590"
# Okabe and Ito's palette, darkened where needed for 3:1 contrast on a white and on a near-black page.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#b8639a", "#3a93c9", "#a1583f", "#7b5fd0", "#b07d00")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "pentagon", "star")
CALM = frozenset({"steady", "normal", "healthy", "nominal"})


@dataclass(frozen=True, slots=True)
class ArmStyle:
    """How an arm is drawn, the same in every figure: colour, plotly dash and marker symbol, width in pixels."""

    colour: str
    dash: str
    symbol: str
    width: float


@dataclass(frozen=True, slots=True)
class Panel:
    """One figure: element id, plotly JSON, what a screen reader says of it, heading, height in pixels."""

    id: str
    spec: str
    label: str
    title: str
    height: int


def arm_styles(arms: Mapping[str, bool], reference_arm: str, subjects: Sequence[str]) -> dict[str, ArmStyle]:
    """Arm → style, from arm → whether a governor is attached.

    Governed arms are solid, optimizers alone dotted; the reference is grey. The subjects and then the other
    governed arms take the first colours. Past eight, colours come again with another dash and marker.
    """
    others = sorted((a for a in arms if a != reference_arm), key=lambda a: (a not in subjects, not arms[a]))
    styles = {reference_arm: ArmStyle(REFERENCE_COLOUR, "solid" if arms[reference_arm] else "dot", "circle", 2.2)}
    for i, arm in enumerate(others):
        again = i >= len(COLOURS)
        dash = ("dash" if again else "solid") if arms[arm] else ("dashdot" if again else "dot")
        symbol = SYMBOLS[(i + 1 + again) % len(SYMBOLS)]
        styles[arm] = ArmStyle(COLOURS[i % len(COLOURS)], dash, symbol, 2.6 if arm in subjects else 1.7)
    return {arm: styles[arm] for arm in arms}


def regime_styles(regimes: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Regime → (colour, hatch). A calm regime is grey; past seven, hatching tells equal colours apart."""
    styles: dict[str, tuple[str, str]] = {r: ("#8b949e", "") for r in regimes if r in CALM}
    for i, regime in enumerate(r for r in regimes if r not in CALM):
        styles[regime] = (COLOURS[(i + 1) % len(COLOURS)], ("", "/", ".")[(i // len(COLOURS)) % 3])
    return {regime: styles[regime] for regime in regimes}


def multiplier_label(multiplier: float) -> str:
    """`1/30×`, `1×`, `30×`: whole divisors as fractions, anything else with up to four digits."""
    divisor = 1.0 / multiplier
    if divisor > 1.5 and abs(divisor - round(divisor)) < 1e-3 * divisor:
        return f"1/{round(divisor)}×"
    return f"{multiplier:.4g}×"


def sensitivity_panel(
    id: str, cells: Sequence[Mapping[str, Any]], styles: Mapping[str, ArmStyle], tuned: float | None, untrained: float
) -> Panel:
    """Mean final loss against the LR multiplier; bars are the 95 % interval, or the range under 3 seeds."""
    traces = []
    for arm, style in styles.items():
        mine = [c for c in cells if c["arm"] == arm]
        spans = [(c["loss_interval"] if c["n"] >= 3 else None) or c["loss_range"] for c in mine]
        traces.append(
            go.Scatter(
                x=[c["lr_multiplier"] for c in mine],
                y=[c["loss_mean"] for c in mine],
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [max(0.0, s[1] - c["loss_mean"]) for s, c in zip(spans, mine, strict=True)],
                    "arrayminus": [max(0.0, c["loss_mean"] - s[0]) for s, c in zip(spans, mine, strict=True)],
                    "thickness": 1.2,
                    "width": 3,
                },
                name=escape(arm),
                meta=arm,
                mode="lines+markers",
                line={"color": style.colour, "dash": style.dash, "width": style.width},
                marker={"size": 9, "symbol": ["x" if c["diverged"] else style.symbol for c in mine]},
                customdata=[
                    f"perplexity {c['ppl_median']:.4g} (median), {c['diverged']} of {c['n']} diverged" for c in mine
                ],
                hovertemplate="%{x}× · %{y:.3f} nats<br>%{customdata}",
            )
        )
    multipliers = sorted({c["lr_multiplier"] for c in cells})
    shapes, notes = [], []
    levels = [(tuned, "tuned<br>reference"), (untrained if any(c["diverged"] for c in cells) else None, "untrained")]
    for level, text in levels:
        if level is not None:
            shapes.append(level_rule(level))
            notes.append(level_text(level, text))
    layout = {
        "xaxis": {
            "type": "log",
            "title": {"text": "learning-rate multiplier"},
            "tickvals": multipliers,
            "ticktext": [multiplier_label(m) for m in multipliers],
            "minor": {"ticks": ""},
        },
        "yaxis": {"title": {"text": "held-out loss, nats per token"}},
        "shapes": shapes,
        "annotations": notes,
        "margin": {"l": 52, "r": 66, "t": 8, "b": 44},
    }
    label = f"Line chart: final held-out loss of {len(traces)} arms at {len(multipliers)} learning-rate multipliers"
    return make_panel(id, traces, layout, label, "", 440)


def loss_panel(
    id: str, multiplier: float, runs: Mapping[str, Metrics], styles: Mapping[str, ArmStyle], top: float
) -> Panel:
    """Training loss (lines) and held-out loss (markers) over steps; what rises above `top` leaves the panel."""
    traces = []
    for arm, metrics in runs.items():
        style = styles[arm]
        if len(metrics.train.finite()):
            traces.append(_line(arm, style, metrics.train, "%{y:.3f} nats, training"))
        if len(metrics.held_out.finite()):
            held_out = _line(arm, style, metrics.held_out, "%{y:.3f} nats, held out")
            traces.append(
                held_out.update(mode="markers", marker={"size": 6, "symbol": style.symbol, "color": style.colour})
            )
    drawn = (float(v) for m in runs.values() for c in (m.train, m.held_out) for v in c.finite())
    lowest = min([top - 1.0, *drawn])
    layout = {
        "xaxis": _steps_axis([m.train for m in runs.values()]),
        "yaxis": {"title": {"text": "loss"}, "range": [lowest - 0.03 * (top - lowest), top]},
    }
    name = multiplier_label(multiplier)
    return make_panel(id, traces, layout, f"Line chart: loss over steps at {name} the base learning rate", name, 270)


def scale_panel(id: str, multiplier: float, runs: Mapping[str, Decisions], styles: Mapping[str, ArmStyle]) -> Panel:
    """Executed LR scale over steps, log axis; triangles are rollbacks, crosses skipped updates."""
    traces = []
    for arm, decisions in runs.items():
        traces.append(_line(arm, styles[arm], decisions.lr_scale, "LR ×%{y:.3g}"))
        for directive, symbol in (("skip", "x"), ("rollback", "triangle-down")):
            marked = [(s, v if v > 0 else 1.0) for s, d, v in decisions.directives if d == directive]
            if marked:
                at, values = np.asarray(marked).T
                marks = _line(arm, styles[arm], Curve(at, values), directive)
                traces.append(
                    marks.update(mode="markers", marker={"size": 8, "symbol": symbol, "color": styles[arm].colour})
                )
    layout = {
        "xaxis": _steps_axis([d.lr_scale for d in runs.values()]),
        "yaxis": {"title": {"text": "LR scale"}, "type": "log", **_log_ticks(runs)},
        "shapes": [level_rule(1.0)],
    }
    name = multiplier_label(multiplier)
    return make_panel(id, traces, layout, f"Line chart: executed learning-rate scale at {name}", name, 270)


def regime_panel(
    id: str, multiplier: float, runs: Mapping[str, Decisions], regimes: Mapping[str, tuple[str, str]]
) -> Panel:
    """One strip per arm, coloured by the regime that its controller named; evidence on hover."""
    traces = []
    for regime, (colour, hatch) in regimes.items():
        named = [(arm, b) for arm, d in runs.items() for b in d.bands if b.regime == regime]
        if named:
            traces.append(
                go.Bar(
                    orientation="h",
                    y=[escape(arm) for arm, _ in named],
                    base=_f4([b.start for _, b in named]),
                    x=_f4([b.end - b.start for _, b in named]),
                    name=escape(regime),
                    marker={"color": colour, "line": {"width": 0}, "pattern": {"shape": hatch, "size": 5}},
                    customdata=[f"steps {b.start:g} to {b.end:g}<br>{b.detail}" for _, b in named],
                    hovertemplate=f"<b>{escape(regime)}</b> · %{{y}}<br>%{{customdata}}<extra></extra>",
                )
            )
    arms = [escape(arm) for arm in runs]
    bands = [band for decisions in runs.values() for band in decisions.bands]
    layout = {
        "barmode": "overlay",
        "bargap": 0.25,
        "hovermode": "closest",
        "xaxis": {**_range([b.start for b in bands], [b.end for b in bands]), "showgrid": False},
        "yaxis": {"categoryorder": "array", "categoryarray": arms[::-1], "fixedrange": True, "showgrid": False},
    }
    name = multiplier_label(multiplier)
    label = f"Timeline: regimes of {len(arms)} governed arms at {name} the base learning rate"
    return make_panel(id, traces, layout, label, name, 80 + 30 * len(arms))


def make_panel(id: str, traces: Sequence[Any], layout: Mapping[str, Any], label: str, title: str, height: int) -> Panel:
    """A panel of traces with the layout that all figures share; `layout` adds to it."""
    common: dict[str, Any] = {
        "template": {},
        "showlegend": False,
        "hovermode": "closest",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 52, "r": 12, "t": 8, "b": 44},
        "height": height,
        "autosize": True,
    }
    common |= layout
    for axis in ("xaxis", "yaxis"):
        common[axis] = {"automargin": True, "zeroline": False, **layout.get(axis, {})}
    spec = go.Figure(data=list(traces), layout=common).to_json()
    return Panel(id, spec, label, title, height)


def _line(arm: str, style: ArmStyle, curve: Curve, hover: str) -> Any:
    return go.Scatter(
        x=_f4(curve.steps),
        y=_f4(np.where(np.isfinite(curve.values), curve.values, np.nan)),
        name=escape(arm),
        meta=arm,
        mode="lines",
        line={"color": style.colour, "dash": style.dash, "width": 0.8 * style.width},
        hovertemplate="step %{x} · " + hover,
    )


def _f4(values: Any) -> NDArray[np.float32]:
    # Single precision halves the page, and is finer than any screen; its range is not a diverged loss's.
    return np.clip(np.asarray(values, dtype=np.float64), -1e30, 1e30).astype(np.float32)


def _steps_axis(curves: Sequence[Curve]) -> dict[str, Any]:
    return _range([float(c.steps[0]) for c in curves], [float(c.steps[-1]) for c in curves])


def _range(starts: Sequence[float], ends: Sequence[float]) -> dict[str, Any]:
    first, last = min(starts), max(ends)
    margin = 0.02 * max(last - first, 1.0)
    return {"title": {"text": "step"}, "range": [first - margin, last + margin]}


def _log_ticks(runs: Mapping[str, Decisions]) -> dict[str, Any]:
    """Range and 1-2-5 ticks (whole decades when there are many) of a log axis that always holds ½ to 2."""
    values = [float(v) for d in runs.values() for v in d.lr_scale.finite()]
    low, high = math.log10(min([0.5, *values])), math.log10(max([2.0, *values]))
    digits = (1, 2, 5) if high - low <= 2 else (1,)
    decades = range(math.floor(low), math.ceil(high) + 1)
    ticks = [d * 10.0**k for k in decades[:: 1 + len(decades) // 7] for d in digits]
    margin = 0.05 * (high - low)
    return {"range": [low - margin, high + margin], "tickvals": ticks, "ticktext": [f"{t:g}" for t in ticks]}


def level_rule(y: float) -> dict[str, Any]:
    """A horizontal line across the panel, as a plotly shape."""
    line = {"width": 1, "dash": "dot", "color": REFERENCE_COLOUR}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": y, "y1": y, "line": line}


def level_text(y: float, text: str) -> dict[str, Any]:
    """What such a line is, beside it, as a plotly annotation."""
    font = {"size": 11, "color": REFERENCE_COLOUR}
    place = {"xref": "paper", "x": 1.006, "xanchor": "left", "yref": "y", "y": y, "yanchor": "middle"}
    return {"text": text, "showarrow": False, "font": font, "align": "left", **place}
