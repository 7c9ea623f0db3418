"""An evaluation for the eye: the table of a terminal, and `report.html`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from rich.table import Table

from lbw_rl.files import replace_file
from lbw_rl.training_runs.evaluation.scores import PROFILE
from lbw_rl.training_runs.evaluation.session import EVALUATION_FILE, POLICY, REFERENCE, RULES
from lbw_rl.training_runs.report_figures import ArmStyle, Panel, arm_styles, make_panel
from lbw_rl.training_runs.report_page import chip, document, figure, legend
from lbw_rl.training_runs.report_tables import provenance_table, table

Evaluation = Mapping[str, Any]


def read_evaluation(directory: Path) -> dict[str, Any]:
    """The content of a folder's `evaluation.json`.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = directory / EVALUATION_FILE
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found["tiers"], found["policies"], found["provenance"]
    except OSError as e:
        raise ValueError(f"evaluation: cannot read {path} ({e.strerror}); accepted: what lbw-rl evaluate wrote") from e
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"evaluation: {path} is damaged ({e}); accepted: what lbw-rl evaluate wrote") from e
    return found


def build_evaluation_report(directory: Path) -> Path:
    """Reads `evaluation.json` of a folder and writes its `report.html`; returns its path.

    Raises:
        ValueError: it is missing or damaged.
    """
    found = read_evaluation(directory)
    tiers = found["tiers"]
    arms = {arm: True for tier in tiers.values() for arm in tier}
    styles = arm_styles({arm: _is_governed(arm) for arm in arms}, REFERENCE, [POLICY])
    chips = {arm: chip(style) for arm, style in styles.items()}
    panels = [_profile_panel(f"profile{i}", name, tier, styles) for i, (name, tier) in enumerate(tiers.items())]
    held_out = {name: t["held_out"] for name, t in found["provenance"]["tiers"].items()}
    sections = "".join(
        f'<h3>{escape(name)}</h3><p class="note">Held out: {escape(held_out[name])}.</p>{_tier_table(tier, chips)}'
        for name, tier in tiers.items()
    )
    count = len(found["policies"])
    body = f"""<h1>Learned against rule-based governance</h1>
<p class="sub">{count} polic{"y" if count == 1 else "ies"} · {len(tiers)} tiers · {len(arms)} arms</p>
<div class="verdict" role="note" aria-label="Verdict"><p>{_verdict(tiers)}</p></div>
<section><h2>Every tier</h2>{_overview(tiers, chips)}{_MEASURES}</section>
<section><h2>Performance profiles</h2>{legend(styles, chips)}
{figure("Share of runs that end within a given distance of tuned AdamW", panels, _PROFILE_CAPTION)}</section>
<section><h2>Every arm</h2>{sections}</section>
<section><h2>Each policy</h2>{_policies(found)}</section>
<section><h2>Provenance</h2>{provenance_table({k: v for k, v in found["provenance"].items() if k != "tuned"})}</section>"""
    page = document("lbw-rl: learned against rule-based governance", body, {panel.id: panel.spec for panel in panels})
    replace_file(directory / "report.html", page.encode())
    return directory / "report.html"


def render_evaluation(found: Evaluation) -> Table:
    """Arms × tiers for a terminal: interquartile mean of the perplexity over tuned AdamW's."""
    tiers = found["tiers"]
    out = Table(title="perplexity / that of AdamW tuned for each task, interquartile mean")
    out.add_column("arm", overflow="fold")
    for name in tiers:
        out.add_column(name, justify="right")
    for arm in next(iter(tiers.values())):
        out.add_row(arm, *(f"{math.exp(tier[arm]['iqm']):.3f}" for tier in tiers.values()))
    return out


def _is_governed(arm: str) -> bool:
    return "tuned" not in arm and RULES.get(arm) != "constant"


def _verdict(tiers: Mapping[str, Any]) -> str:
    """In how many tiers the policy beats every rule, and what it loses where it does not."""
    rules = [arm for arm, name in RULES.items() if name in ("pid", "entropic", "lbw-guard")]
    words, won = [], 0
    for name, tier in tiers.items():
        against = {rule: tier[POLICY]["against"][rule] for rule in rules}
        better = all(a["iqm_interval"][1] < 0 for a in against.values())
        won += better
        worst = max(against, key=lambda rule: against[rule]["iqm"])
        a = against[worst]
        words.append(
            f"<b>{escape(name)}</b> {math.exp(a['iqm']):.3f} × {escape(worst)}'s "
            f"[{math.exp(a['iqm_interval'][0]):.3f}, {math.exp(a['iqm_interval'][1]):.3f}]"
        )
    return (
        f"The policy ends better than every rule, with an interval that excludes equality, in {won} of {len(tiers)} tiers. "
        f"Its perplexity over that of the rule that does best against it: {'; '.join(words)}."
    )


def _overview(tiers: Mapping[str, Any], chips: Mapping[str, str]) -> str:
    arms = list(next(iter(tiers.values())))
    best = {name: min(tier[arm]["iqm"] for arm in arms) for name, tier in tiers.items()}
    rows = []
    for arm in arms:
        cells = []
        for name, tier in tiers.items():
            low, high = tier[arm]["iqm_interval"]
            text = f"{math.exp(tier[arm]['iqm']):.3f}"
            within = f"<small>[{math.exp(low):.3f}, {math.exp(high):.3f}]</small>"
            cells.append(
                f'<td class="best"><b>{text}</b>{within}</td>' if tier[arm]["iqm"] == best[name] else text + within
            )
        rows.append([chips.get(arm, "") + escape(arm), *cells])
    return table("Perplexity over that of AdamW tuned for each task", ["Arm", *map(escape, tiers)], rows)


def _tier_table(tier: Mapping[str, Any], chips: Mapping[str, str]) -> str:
    rows = []
    for arm, s in tier.items():
        against = tier[POLICY]["against"].get(arm)
        improves = "–" if against is None else f"{against['improves']:.2f}<small>[{against['improves_interval'][0]:.2f}, {against['improves_interval'][1]:.2f}]</small>"  # fmt: skip
        difference = "–" if against is None else f"{math.exp(against['iqm']):.3f}<small>[{math.exp(against['iqm_interval'][0]):.3f}, {math.exp(against['iqm_interval'][1]):.3f}]</small>"  # fmt: skip
        rows.append(
            [
                chips.get(arm, "") + escape(arm),
                f"{s['median_ppl']:.2f}",
                f"{s['lr_sensitivity']:.3f}",
                f"{s['diverged']:.1%}",
                difference,
                improves,
            ]
        )
    head = [
        "Arm",
        "Median perplexity",
        "LR sensitivity, nats",
        "Diverged",
        "Policy's perplexity / its",
        "Policy is better",
    ]
    return table("All figures of a tier", head, rows)


def _policies(found: Evaluation) -> str:
    tiers = list(found["tiers"])
    rows = [
        [
            f"<code>{escape(path)}</code>",
            *(f"{math.exp(of[t]['against']['LBW-Guard-style']['iqm']):.3f}" for t in tiers),
        ]
        for path, of in found["policies"].items()
    ]
    return table("Each policy's perplexity over LBW-Guard-style's", ["Policy", *map(escape, tiers)], rows)


def _profile_panel(id: str, title: str, tier: Mapping[str, Any], styles: Mapping[str, ArmStyle]) -> Panel:
    traces = [
        go.Scatter(
            x=[math.exp(tau) for tau in PROFILE],
            y=tier[arm]["profile"],
            name=escape(arm),
            meta=arm,
            mode="lines",
            line={"color": style.colour, "dash": style.dash, "width": style.width},
            hovertemplate="within %{x:.2f} × · %{y:.0%} of runs",
        )
        for arm, style in styles.items()
        if arm in tier
    ]
    layout = {
        "xaxis": {"title": {"text": "perplexity / tuned AdamW's"}},
        "yaxis": {"title": {"text": "share of runs"}, "range": [0, 1.02], "tickformat": ".0%"},
    }
    return make_panel(id, traces, layout, f"Line chart: performance profiles on {title}", title, 320)


_MEASURES = (
    '<p class="note">Interquartile mean over tasks, learning-rate multiples (1/30, 1, 30) and seeds of the ratio to AdamW at the '
    "schedule and rate that are best for the task, which has no error of its rate to bear. Brackets: 95 % bootstrap intervals over "
    "policies, tasks and seeds (Agarwal et al., arXiv 2108.13264). A diverged run counts with the untrained model's loss. All arms "
    "decide every two steps, but those that say otherwise.</p>"
)
_PROFILE_CAPTION = "Higher and further left is better. At 1 the curve tells which share of an arm's runs, however wrong their rate, end at least as well as tuned AdamW."
