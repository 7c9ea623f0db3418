"""The suite's `report.html`: targets, the source's table, the learning-rate axis, every family, how it was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table

from lbw_rl.files import replace_file
from lbw_rl.training_runs.report_figures import arm_styles, multiplier_label
from lbw_rl.training_runs.report_page import DESIGN_NOTE, chip, document, figure, legend
from lbw_rl.training_runs.report_tables import provenance_table
from lbw_rl.training_runs.report_text import lacking_records, mixed_code
from lbw_rl.training_runs.results import read_results
from lbw_rl.training_runs.stress.figures import axis_panel
from lbw_rl.training_runs.stress.session import STRESS
from lbw_rl.training_runs.stress.tables import (
    conduct_table,
    family_table,
    limit,
    loss_table,
    shown,
    source_rows,
    target_table,
    tuning_table,
)
from lbw_rl.training_runs.summary import UNGOVERNED

Findings = Mapping[str, Any]


def read_findings(directory: Path) -> dict[str, Any]:
    """The content of a suite's `stress.json`.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = directory / STRESS
    try:
        findings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if findings["schema"] != 1:
            raise ValueError(f"schema {findings['schema']}")
    except OSError as e:
        raise ValueError(f"stress: cannot read {path} ({e.strerror}); accepted: the folder of a finished suite") from e
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"stress: {path} is damaged ({e}); accepted: what lbw-rl stress wrote") from e
    return findings


def build_stress_report(directory: str | Path) -> Path:
    """Reads `stress.json` and `results.json` of a folder and writes its `report.html`.

    Returns:
        The path written.

    Raises:
        ValueError: one of the two is missing or damaged.
    """
    directory = Path(directory)
    findings, rows = read_findings(directory), read_results(directory).rows
    governed = {row.arm: row.controller not in UNGOVERNED for row in rows}
    styles = arm_styles(governed, findings["reference_arm"], [findings["governor"]])
    chips = {arm: chip(style) for arm, style in styles.items()}
    panels = [
        axis_panel(
            f"family{i}",
            family["name"],
            [row for row in rows if row.recipe == family["name"]],
            styles,
            family["reference"]["loss"],
        )
        for i, family in enumerate(findings["families"])
    ]
    families = "".join(
        f"<h3>{escape(family['name'])}</h3>{loss_table(family, chips)}{conduct_table(family, chips)}"
        for family in findings["families"]
    )
    lacking = {run: files for family in findings["families"] for run, files in family.get("lacking", {}).items()}
    seeds = findings["seeds"]
    body = f"""<h1>The learning-rate axis under stress</h1>
<p class="sub">Suite {escape(findings["suite"])}: {findings["runs"]} runs · {len(findings["families"])} families ·
{len(styles)} arms · {seeds} seed{"s" * (seeds > 1)}</p>
<div class="verdict" role="note" aria-label="Verdict"><p>{_verdict(findings)}</p>{mixed_code(rows)}{lacking_records(lacking)}{target_table(findings)}</div>
<section><h2>The source's table beside ours</h2><p>{DESIGN_NOTE}</p>{source_rows(findings)}</section>
<section><h2>The learning-rate axis</h2>{legend(styles, chips)}
{figure("Final loss against the learning rate", panels, _AXIS_CAPTION)}</section>
<section><h2>Families</h2>{family_table(findings)}{tuning_table(findings)}</section>
<section><h2>Every arm</h2>{_MEASURES}{families}</section>
<section><h2>Provenance</h2>{_provenance(findings)}</section>"""
    page = document("lbw-rl: the learning-rate axis under stress", body, {panel.id: panel.spec for panel in panels})
    replace_file(directory / "report.html", page.encode())
    return directory / "report.html"


def render_targets(findings: Findings) -> Table:
    """The targets for a terminal."""
    table = Table(title=f"{findings['governor']} against its targets")
    table.add_column("target", overflow="fold")
    for head in ("limit", "measured", "held out", "met"):
        table.add_column(head, justify="right", no_wrap=True)
    for target in findings["targets"]:
        met = "–" if target["met"] is None else "yes" if target["met"] else "NO"
        claim = f"{target['claim']}, {target['scope']}"
        table.add_row(claim, limit(target), shown(target), shown(target, "held_out"), met)
    return table


def _verdict(findings: Findings) -> str:
    judged = [t for t in findings["targets"] if t["met"] is not None]
    met = [t for t in judged if t["met"]]
    name = f'<b class="arm">{escape(findings["governor"])}</b>'
    text = f"{name} meets {len(met)} of the {len(judged)} targets that these runs can judge."
    if findings["preview"]:
        text += f" A preview: {escape('; '.join(findings['preview']))}. It shows nothing yet."
    return text


def _provenance(findings: Findings) -> str:
    corpora = {family["corpus"]: f"sha256 {family['corpus_sha256']}" for family in findings["families"]}
    return provenance_table({**findings["provenance"], "settings": findings["settings"] or None, "corpora": corpora})


_AXIS_CAPTION = (
    "Lines: mean over seeds; thin dashes: single seeds. A cross marks a rate at which a run diverged (its loss is capped at "
    "the untrained model's). Solid and dashed lines are governed arms, dotted and dash-dotted ones optimizers alone. "
    f"{multiplier_label(1.0)} is the rate that was tuned for AdamW, 1 for Prodigy. The horizontal line is tuned AdamW's loss."
)

_MEASURES = (
    '<p class="note">Perplexities are exp of the mean held-out loss over seeds. A diverged run counts with its loss capped at '
    "the untrained model's. LR sensitivity: mean over the multipliers of min(final, initial) loss minus the best (Wortsman et "
    "al., arXiv 2309.14322); as rivals in that respect count optimizers that at their best multiplier come within 10 % of tuned "
    "AdamW's perplexity, since one that never learns is flat as well. “× tuned”: perplexity ratio to AdamW at its best rate and schedule, paired by seed. Brackets: 95 % "
    "bootstrap intervals over seeds, which with three seeds are hardly wider than their range.</p>"
    '<p class="note">Steps to AdamW\'s loss: until the held-out loss, linear between evaluations, first is at the loss that '
    "tuned AdamW ends with at that seed; divided by the steps that AdamW itself needs to get there, median over seeds. Seconds: "
    "those steps times the arm's median step time, over its runs, governance included, evaluation not; optimizers alone run with "
    "governance off. Beyond modulation: share of decisions that skip, roll back or answer an alarm, on runs at "
    f"{multiplier_label(1.0)}, where nothing is wrong. Tokens per second, and all times, are of this machine under the load of "
    "the suite's own workers.</p>"
)
