"""`report.html`: one self-contained page from a folder of results. No network, light and dark, any width."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from lbw_rl.training_runs.report_data import RecipeRuns, read_decisions, read_metrics
from lbw_rl.training_runs.report_figures import (
    ArmStyle,
    Panel,
    arm_styles,
    loss_panel,
    multiplier_label,
    regime_panel,
    regime_styles,
    scale_panel,
    sensitivity_panel,
)
from lbw_rl.training_runs.report_page import claims, page, section
from lbw_rl.training_runs.report_tables import number
from lbw_rl.training_runs.results import Results, Row, read_results
from lbw_rl.training_runs.summary import UNGOVERNED, capped, default_reference, summarise

POINTS = 80_000
"""Curve points of one kind of figure on the whole page; with `BANDS` and plotly it stays under 8 MB."""
BANDS = 8_000


def build_report(directory: str | Path) -> Path:
    """Reads `directory/results.json` and the runs it names, and writes `directory/report.html`.

    A run without metrics or ledger is left out of the figures, and a note says so. The statistics are
    computed anew from the rows; `summary` contributes its `reference_arm`, `subjects` and `provenance`.

    Returns:
        The path written.

    Raises:
        ValueError: `results.json` is missing, malformed, or has no row.
    """
    directory = Path(directory)
    results = read_results(directory / "results.json")
    if not results.rows:
        raise ValueError(f"results: {directory / 'results.json'} has no rows; accepted: at least one finished run")
    summary = _statistics(results)
    arms = {row.arm: row.controller not in UNGOVERNED for row in results.rows}
    styles = arm_styles(arms, summary["reference_arm"], summary["subjects"])
    lines = len({(r.recipe, r.arm, r.lr_multiplier) for r in results.rows})
    budget = min(400, max(40, POINTS // lines)), min(200, max(30, BANDS // lines))
    sections: list[str] = []
    beside: list[str] = []
    specs: dict[str, str] = {}
    for i, recipe in enumerate(dict.fromkeys(row.recipe for row in results.rows)):
        rows = [row for row in results.rows if row.recipe == recipe]
        runs = _read_runs(directory, rows, *budget)
        panels = _panels(f"r{i}", summary, rows, runs, styles)
        specs |= {panel.id: panel.spec for group in panels.values() for panel in group}
        sections.append(section(recipe, summary, rows, runs, panels, styles))
        beside.append(claims(recipe, rows, summary, runs))
    path = directory / "report.html"
    temporary = path.with_name(f".report.html.{os.getpid()}.tmp")
    temporary.write_text(page(results, summary, sections, beside, specs), encoding="utf-8")
    os.replace(temporary, path)
    return path


def render_table(results: Results) -> Table:
    """The report's main table for a terminal: median perplexity by arm and multiplier, `*` marks the best."""
    summary = _statistics(results)
    multipliers = sorted({c["lr_multiplier"] for c in summary["cells"]})
    several = len({a["recipe"] for a in summary["arms"]}) > 1
    shown = Table(title="Final held-out perplexity (median over seeds)")
    for head in [*(["recipe"] if several else []), "arm"]:
        shown.add_column(head, overflow="fold")
    for head in [*(f"{multiplier_label(m)} LR" for m in multipliers), "LR sens.", "worst ppl", "diverged", "overhead"]:
        shown.add_column(head, justify="right", no_wrap=True)
    for arm in summary["arms"]:
        cells = [c for c in summary["cells"] if c["recipe"] == arm["recipe"]]
        line = [*([arm["recipe"]] if several else []), arm["arm"]]
        for m in multipliers:
            column = [c for c in cells if c["lr_multiplier"] == m]
            cell = next((c for c in column if c["arm"] == arm["arm"]), None)
            best = min((c["ppl_median"] for c in column), default=None)
            mark = "*" if cell and cell["ppl_median"] == best else ""
            line.append(number(cell["ppl_median"]) + mark if cell else "–")
        share = arm["overhead_fraction"]
        line += [f"{arm['lr_sensitivity']:.3f}", number(arm["worst_ppl"]), f"{arm['diverged']}/{arm['runs']}"]
        shown.add_row(*line, "–" if share is None else f"{share:.1%}")
    return shown


def _statistics(results: Results) -> dict[str, Any]:
    arms = {row.arm for row in results.rows}
    reference = results.summary.get("reference_arm")
    if reference not in arms:
        reference = default_reference(results.rows)
    subjects = results.summary.get("subjects")
    known = [s for s in subjects if s in arms] if isinstance(subjects, list) else []
    return summarise(results.rows, str(reference), known or None)


def _median_run(rows: Sequence[Row]) -> Row:
    return sorted(rows, key=lambda row: (row.final_loss, row.seed))[(len(rows) - 1) // 2]


def _read_runs(directory: Path, rows: Sequence[Row], points: int, bands: int) -> RecipeRuns:
    runs = RecipeRuns()
    groups: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.lr_multiplier, row.arm), []).append(row)
    for multiplier, arm in sorted(groups, key=lambda key: key[0]):
        row = _median_run(groups[multiplier, arm])
        folder, label = directory / row.folder, f"{arm} at {multiplier_label(multiplier)}"
        metrics = read_metrics(folder / "metrics.jsonl", points)
        if metrics is None:
            runs.without_metrics.append(label)
        else:
            runs.metrics.setdefault(multiplier, {})[arm] = metrics
        if row.controller in UNGOVERNED:
            continue  # one that only observes has a ledger too, of a scale that is always 1
        decisions = read_decisions(folder / "ledger.jsonl", points, bands)
        if decisions is None:
            runs.without_ledger.append(label)
        else:
            runs.decisions.setdefault(multiplier, {})[arm] = decisions
    return runs


def _panels(
    prefix: str, summary: Mapping[str, Any], rows: Sequence[Row], runs: RecipeRuns, styles: Mapping[str, ArmStyle]
) -> dict[str, list[Panel]]:
    recipe = rows[0].recipe
    cells = [c for c in summary["cells"] if c["recipe"] == recipe]
    mine = {arm: style for arm, style in styles.items() if any(c["arm"] == arm for c in cells)}
    untrained = fmean(row.initial_loss for row in rows)
    tuned = summary["reference"].get(recipe)
    top = max(row.initial_loss for row in rows) + 0.08 * (untrained - min(capped(row) for row in rows))
    regimes = regime_styles(runs.regimes())
    return {
        "sensitivity": [
            sensitivity_panel(f"{prefix}-lr", cells, mine, tuned["final_loss"] if tuned else None, untrained)
        ],
        "loss": [loss_panel(f"{prefix}-loss{i}", m, r, mine, top) for i, (m, r) in enumerate(runs.metrics.items())],
        "scale": [scale_panel(f"{prefix}-scale{i}", m, r, mine) for i, (m, r) in enumerate(runs.decisions.items())],
        "regime": [regime_panel(f"{prefix}-reg{i}", m, r, regimes) for i, (m, r) in enumerate(runs.decisions.items())],
    }
