"""Puts the report together: a section a recipe, the sources' claims, provenance, and the page around them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from plotly.offline import get_plotlyjs

from lbw_rl.training_runs.report_data import RecipeRuns
from lbw_rl.training_runs.report_figures import ArmStyle, Panel, regime_styles
from lbw_rl.training_runs.report_style import CSS, SCRIPT
from lbw_rl.training_runs.report_tables import comparison_table, conduct_table, main_table, provenance_table, tiles
from lbw_rl.training_runs.report_text import entropic_claims, guard_claims, lacking_records, mixed_code, verdict
from lbw_rl.training_runs.results import Results, Row

_OUTLINES = {
    "circle": '<circle cx="14" cy="7" r="4"/>',
    "square": '<path d="M10 3h8v8h-8z"/>',
    "diamond": '<path d="M14 1.5 19.5 7 14 12.5 8.5 7z"/>',
    "triangle-up": '<path d="M14 2 19 11H9z"/>',
    "pentagon": '<path d="M14 2 19 6 17 12H11L9 6z"/>',
    "star": '<path d="m14 1 1.7 4 4.3.3-3.3 2.8 1 4.4-3.7-2.3-3.7 2.3 1-4.4L8 5.3l4.3-.3z"/>',
}
_STROKES = {"solid": "", "dash": "6 3", "dot": "2 2.5", "dashdot": "6 2 1.5 2"}

DESIGN_NOTE = (
    "Our <code>lbw-guard</code> is our own design (“LBW-Guard-style”): the paper's control law is not public. Not "
    "known from its public text either: steps, batch, LoRA rank, reference learning rate, hardware, seeds. The models "
    "differ too, so the two sides show whether the shape of the effect recurs, not whether its size does. The paper's own "
    "run at LR 1e-3 (10.33) is better than its reference (10.74), so its reference learning rate was not tuned; that "
    "is why the tables here hold an LR-tuned baseline."
)


def chip(style: ArmStyle) -> str:
    """A small drawing of an arm's line and marker, as in the figures."""
    return (
        f'<svg class="chip" viewBox="0 0 28 14" aria-hidden="true" fill="{style.colour}" stroke="{style.colour}">'
        f'<path d="M0 7h28" stroke-width="2" stroke-dasharray="{_STROKES[style.dash]}"/>{_OUTLINES[style.symbol]}</svg>'
    )


def section(
    recipe: str,
    summary: Mapping[str, Any],
    rows: Sequence[Row],
    runs: RecipeRuns,
    panels: Mapping[str, Sequence[Panel]],
    styles: Mapping[str, ArmStyle],
) -> str:
    """Everything about one recipe."""
    arms = {a["arm"]: a for a in summary["arms"] if a["recipe"] == recipe}
    cells = [c for c in summary["cells"] if c["recipe"] == recipe]
    comparisons = [c for c in summary["comparisons"] if c["recipe"] == recipe]
    chips = {arm: chip(styles[arm]) for arm in arms}
    reference = arms.get(summary["reference_arm"])
    subject = next((arms[s] for s in summary["subjects"] if s in arms), None)
    against = [
        c for c in comparisons if subject and (c["arm"], c["against"]) == (subject["arm"], summary["reference_arm"])
    ]
    tuned = against[0]["each_tuned"] if against else None
    counts = sorted({c["n"] for c in cells})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    parts = [
        f"<h2>{escape(recipe)}</h2>",
        f'<p class="sub">{len(rows)} runs: {len(arms)} arms, {len({r.lr_multiplier for r in rows})} learning rates, '
        f"{seeds} seed{'s' * (counts[-1] > 1)} each; {max(r.steps for r in rows):,} steps.</p>",
        f'<p class="note">Headline numbers of {escape(subject["arm"])}:</p>' if subject and reference else "",
        tiles(subject, reference, tuned) if subject and reference else "",
        main_table(cells, list(arms.values()), chips, summary["reference_arm"]),
        f'<p class="note">{_spread_words(counts)} A diverged run counts with its loss capped '
        "at the untrained model's. LR sensitivity: mean over the multipliers of min(final, initial) loss minus the best "
        "(Wortsman et al., arXiv 2309.14322); 0 is perfectly flat. “× tuned”: ratio to the "
        "reference arm at its own best learning rate, geometric mean over paired seeds. Overhead: the governor's share of the run's time.</p>",
        legend(styles, chips),
        figure("Final loss against the learning rate", panels["sensitivity"], _sensitivity_caption(counts)),
    ]
    if comparisons:
        parts += [
            *(comparison_table(s, [c for c in comparisons if c["arm"] == s], chips) for s in summary["subjects"]),
            '<p class="note">Under 1 favours the arm in the caption. Intervals: Student\'s t over seeds, not corrected for the '
            "number of arms; “not separated” means that the interval contains 1.</p>",
        ]
    loss_note = (
        "Lines: training loss, a running mean over 2 % of the run. Markers: held-out loss. One run a line: the seed "
        "whose final loss is the median. A line that leaves the panel at the top lost what it had learned."
    )
    parts += [
        figure("Loss over the run", panels["loss"], loss_note + _missing("metrics", runs.without_metrics), " LR"),
        figure(
            "Learning-rate scale that was executed",
            panels["scale"],
            "Multiple of the scheduled learning rate, after the authority's bounds; 1 leaves it alone. Crosses are "
            "skipped updates, triangles rollbacks. Same seeds as above; an arm without a governor has no line."
            + _missing("ledger", runs.without_ledger),
            " LR",
        ),
        _regimes(panels["regime"], runs, escape(recipe, quote=True)),
        conduct_table(cells, list(arms.values()), chips),
    ]
    return f"<section>{''.join(parts)}</section>"


def claims(recipe: str, rows: Sequence[Row], summary: Mapping[str, Any], runs: RecipeRuns) -> str:
    """The tables that put the two sources' claims beside one recipe."""
    reference = summary["reference_arm"]
    tuned = summary["reference"].get(recipe, {}).get("lr_multiplier")
    entropic = next((row.arm for row in rows if row.controller == "entropic"), "")
    at_base = runs.decisions.get(1.0, {}).get(entropic)
    used = at_base.gpu_utilization if at_base and math.isfinite(at_base.gpu_utilization) else None
    return guard_claims(recipe, rows, reference, tuned) + entropic_claims(recipe, rows, reference, used)


def page(
    results: Results,
    summary: Mapping[str, Any],
    sections: Sequence[str],
    beside: Sequence[str],
    specs: Mapping[str, str],
) -> str:
    """The whole document: `beside` are the claims' tables; `specs` maps a figure's element id to plotly JSON."""
    recipes = list(dict.fromkeys(row.recipe for row in results.rows))
    seeds = len({row.seed for row in results.rows})
    verdicts = "".join(verdict(recipe, summary, len(recipes) > 1) for recipe in recipes)
    body = f"""<h1>Governed training under learning-rate stress</h1>
<p class="sub">{len(results.rows)} runs · {len({r.arm for r in results.rows})} arms · {seeds} seed{"s" * (seeds > 1)} ·
{escape(", ".join(recipes))}</p>
<div class="verdict" role="note" aria-label="Verdict">{verdicts}{mixed_code(results.rows)}{lacking_records(results.summary.get("lacking") or {})}
<p class="note">Computed from the rows of <code>results.json</code>. “Beat” means that the 95 % interval of the paired
perplexity ratio lies wholly under 1; ratios under 1 are better.</p></div>
{"".join(sections)}
<section><h2>The sources' claims beside ours</h2><p>{DESIGN_NOTE}</p>{"".join(beside)}</section>
<section><h2>Provenance</h2>{provenance_table(results.summary.get("provenance"))}</section>"""
    return document("lbw-rl: governed training under learning-rate stress", body, specs)


def document(title: str, body: str, specs: Mapping[str, str]) -> str:
    """A self-contained page: `body` is markup, `specs` maps a figure's element id to plotly JSON."""
    figures = ",".join(f'"{key}":{spec}' for key, spec in specs.items()).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
{body}
<noscript><p>The tables are complete; the figures need JavaScript, which this file carries.</p></noscript>
</main>
<script>{get_plotlyjs()}</script>
<script type="application/json" id="figures">{{{figures}}}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def legend(styles: Mapping[str, ArmStyle], chips: Mapping[str, str]) -> str:
    """A button per arm that hides and shows it in the figures of its section."""
    buttons = "".join(
        f'<li><button type="button" aria-pressed="true" data-arm="{escape(arm, quote=True)}">{chips[arm]}'
        f"{escape(arm)}</button></li>"
        for arm in styles
        if arm in chips
    )
    return f'<ul class="legend sticky" aria-label="Arms; press one to hide or show it in the figures">{buttons}</ul>'


def _plot(panel: Panel) -> str:
    label = escape(panel.label, quote=True)
    return f'<div class="plot" id="{panel.id}" role="img" aria-label="{label}" style="height:{panel.height}px"></div>'


def figure(title: str, panels: Sequence[Panel], caption: str, after: str = "") -> str:
    """Panels side by side under a heading; `after` follows the title of each that has one."""
    if panels:
        boxes = "".join(
            f'<div class="panel">{f"<h4>{escape(p.title)}{after}</h4>" if p.title else ""}{_plot(p)}</div>'
            for p in panels
        )
    else:
        boxes = "<p>No run left anything to draw.</p>"
    return f'<h3>{title}</h3><figure><div class="grid">{boxes}</div><figcaption>{caption}</figcaption></figure>'


def _regimes(panels: Sequence[Panel], runs: RecipeRuns, recipe: str) -> str:
    if not panels:
        return "<h3>Regimes</h3><p>No governed run left a ledger.</p>"
    # The lowest and highest rates are where regimes differ most; open on the highest.
    shown = len(panels) - 1
    tabs = "".join(
        f'<button type="button" role="tab" aria-controls="{p.id}-tab" aria-selected="{str(i == shown).lower()}">{p.title}'
        "</button>"
        for i, p in enumerate(panels)
    )
    boxes = "".join(
        f'<div class="panel" role="tabpanel" id="{p.id}-tab"{" hidden" * (i != shown)}>{_plot(p)}</div>'
        for i, p in enumerate(panels)
    )
    keys = "".join(
        f'<li class="key"><i style="background:{_fill(colour, hatch)}"></i>{escape(regime)}</li>'
        for regime, (colour, hatch) in regime_styles(runs.regimes()).items()
    )
    return (
        f'<h3>Regimes over the run</h3><div class="tabs" role="tablist" aria-label="Learning rate, {recipe}">{tabs}</div>'
        f'<ul class="legend" aria-label="Colours of the regimes">{keys}</ul><figure>{boxes}<figcaption>What each '
        "controller took the run's state for; point at a band for its evidence. Where a strip holds more "
        "bands than it can show, each slice shows its rarest regime.</figcaption></figure>"
    )


def _fill(colour: str, hatch: str) -> str:
    if not hatch:
        return colour
    angle = "135deg" if hatch == "/" else "0deg"
    return f"repeating-linear-gradient({angle},{colour} 0 2px,transparent 2px 4px)"


def _spread_words(counts: Sequence[int]) -> str:
    if counts[-1] == 1:
        return "One seed: nothing can be said of the spread."
    words = {
        "95 % bootstrap intervals of the mean": counts[-1] >= 5,
        "95 % bootstrap intervals of the mean, which with so few seeds are about their range": 3 <= counts[-1] < 5,
        "the range where there are 2 seeds": 2 in counts,
    }
    return f"Medians over seeds; under them {', '.join(word for word, used in words.items() if used)}."


def _sensitivity_caption(counts: Sequence[int]) -> str:
    bars = {
        "the 95 % bootstrap interval of the mean": counts[-1] >= 3,
        "minimum to maximum where there are fewer than 3 seeds": counts[0] < 3,
    }
    return (
        f"Mean over seeds; bars show {' and '.join(text for text, used in bars.items() if used)}. A cross marks a "
        "learning rate at which a run diverged (its loss is capped at the untrained model's). Solid and dashed lines are "
        "governed arms, dotted and dash-dotted ones optimizers alone; the horizontal line is the reference arm at its best learning rate."
    )


def _missing(kind: str, labels: Sequence[str]) -> str:
    if not labels:
        return ""
    shown = ", ".join(escape(label) for label in labels[:8]) + (
        f" and {len(labels) - 8} more" if len(labels) > 8 else ""
    )
    return f' <strong class="missing">No {kind} for {shown}: left out.</strong>'
