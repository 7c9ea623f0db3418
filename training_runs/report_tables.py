"""The report's tables and tiles, as markup computed from a summary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from lbw_rl.training_runs.report_figures import multiplier_label

Record = Mapping[str, Any]


def number(value: float | None) -> str:
    """A perplexity or time with four significant digits at most; `–` for none."""
    if value is None:
        return "–"
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def ratio(judged: Record) -> str:
    """`×0.934 [0.902, 0.967]`, the interval where there is one."""
    if judged["ratio"] is None:
        return "no pairs"
    bounds = judged["interval"]
    return multiple(judged["ratio"]) + (f" [{_fixed(bounds[0])}, {_fixed(bounds[1])}]" if bounds else "")


def multiple(value: float) -> str:
    """`×0.934`, `×12.3`."""
    return "×" + _fixed(value)


def _fixed(value: float) -> str:
    return f"{value:.3f}" if 0.001 <= value < 2 else f"{value:.3g}"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table in a container of its own that scrolls sideways; cells are markup, first of a row its header."""
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    label = escape(caption, quote=True)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table class="{kind}">'
        f"<caption>{caption}</caption><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def main_table(cells: Sequence[Record], arms: Sequence[Record], chips: Mapping[str, str], reference_arm: str) -> str:
    """Arm × multiplier median perplexity with interval and divergences, then the arm's figures of merit."""
    multipliers = sorted({c["lr_multiplier"] for c in cells})
    at = {(c["arm"], c["lr_multiplier"]): c for c in cells}
    best = {m: min(c["ppl_median"] for c in cells if c["lr_multiplier"] == m) for m in multipliers}
    columns = ["lr_sensitivity", "worst_ppl", "best_ppl", "overhead_fraction"]
    complete = [a for a in arms if a["grid_complete"]] or arms
    lowest = {
        key: min((a[key] for a in (complete if key == "lr_sensitivity" else arms) if a[key]), default=None)
        for key in columns[:3]
    }
    lowest["lr_sensitivity"] = min((a["lr_sensitivity"] for a in complete), default=None)
    head = ["Arm", *(f"{multiplier_label(m)} LR" for m in multipliers)]
    head += ["LR sensitivity<small>nats</small>", "Worst ppl", "Best ppl", "Overhead"]
    rows = []
    for arm in arms:
        name = arm["arm"]
        row = [chips.get(name, "") + escape(name)]
        row += [_cell(at.get((name, m)), best[m]) for m in multipliers]
        partial = "" if arm["grid_complete"] else "<small>part of the grid</small>"
        row.append(
            _td(
                f"{arm['lr_sensitivity']:.3f}",
                partial,
                not partial and arm["lr_sensitivity"] == lowest["lr_sensitivity"],
            )
        )
        for key in ("worst", "best"):
            where = f"<small>at {multiplier_label(arm[f'{key}_multiplier'])}</small>"
            if key == "best":
                to_tuned = at[name, arm["best_multiplier"]]["ratio_to_tuned"]
                where += "<small>LR-tuned</small>" if name == reference_arm else ""
                where += f"<small>{multiple(to_tuned)} tuned</small>" if to_tuned and name != reference_arm else ""
            row.append(_td(number(arm[f"{key}_ppl"]), where, arm[f"{key}_ppl"] == lowest[f"{key}_ppl"]))
        share = arm["overhead_fraction"]
        row.append("–" if share is None else f"{share:.1%}")
        rows.append(row)
    return table("Final held-out perplexity by arm and learning rate", head, rows, "main")


def _cell(cell: Record | None, best: float) -> str:
    if cell is None:
        return '<td class="none">–</td>'
    if cell["n"] == 1:
        spread = "one seed"
    elif cell["n"] >= 3 and cell["ppl_interval"]:
        spread = "[{}, {}]".format(*map(number, cell["ppl_interval"]))
    else:
        spread = "{} … {}".format(*map(number, cell["ppl_range"])) if cell["n"] == 2 else cell["interval_note"]
    under = f"<small>{spread}</small>"
    if cell["diverged"]:
        under += f'<small class="bad">{cell["diverged"]}/{cell["n"]} diverged</small>'
    return _td(number(cell["ppl_median"]), under, cell["ppl_median"] == best)


def _td(value: str, under: str, best: bool) -> str:
    if best:
        return f'<td class="best"><b>{value}<span class="star" title="best of the column">★</span></b>{under}</td>'
    return f"<td>{value}{under}</td>"


def conduct_table(cells: Sequence[Record], arms: Sequence[Record], chips: Mapping[str, str]) -> str:
    """What each arm did and what it cost: divergences, interventions, skips, rollbacks, time, target."""
    rows = []
    for arm in arms:
        mine = [c for c in cells if c["arm"] == arm["arm"]]
        reached = sum(c["reached_target"] for c in mine)
        steps = [c["steps_to_target"] for c in mine if c["steps_to_target"] is not None]
        target = f"{min(steps):g}<small>reached by {reached} of {arm['runs']} runs</small>" if steps else "–"
        rows.append(
            [
                chips.get(arm["arm"], "") + escape(arm["arm"]),
                f"{arm['diverged']} of {arm['runs']}<small>{arm['divergence_rate']:.0%}</small>",
                f"{arm['interventions']:g}",
                f"{arm['skips']}",
                f"{arm['rollbacks']}",
                f"{number(arm['seconds'])} s",
                target,
            ]
        )
    head = ["Arm", "Diverged", "Interventions<small>median of a run</small>", "Skips<small>all runs</small>"]
    head += ["Rollbacks<small>all runs</small>", "Time<small>median of a run</small>"]
    head += ["Steps to target<small>best multiplier, median seed</small>"]
    return table("What each arm did, and what it cost", head, rows)


def comparison_table(subject: str, comparisons: Sequence[Record], chips: Mapping[str, str]) -> str:
    """Paired perplexity ratios of one subject to each other arm; nothing where the subject was not run."""
    if not comparisons:
        return ""
    words = {"better": "lower", "worse": "higher", "unresolved": "not separated", "no interval": "no interval"}
    rows = [
        [
            chips.get(c["against"], "") + escape(c["against"]),
            *(
                f'<td class="{judged["verdict"].split()[0]}">{ratio(judged)}<small>{words[judged["verdict"]]}, '
                f"{judged['n']} pair{'s' * (judged['n'] != 1)}</small></td>"
                for judged in (c["same_lr"], c["each_tuned"])
            ),
        ]
        for c in comparisons
    ]
    head = ["Against", "At the same LR<small>mean over the grid</small>", "Each at its best LR"]
    caption = f"Perplexity of {escape(subject)} as a multiple of every other arm's, with 95 % intervals"
    return table(caption, head, rows, "pairs")


def tiles(subject: Record, reference: Record, tuned: Record | None) -> str:
    """Four headline numbers of one arm beside the reference arm's; `tuned` compares the two at their best LRs."""
    name = escape(reference["arm"])
    own, bounds = (multiple(tuned["ratio"]), tuned["interval"]) if tuned and tuned["ratio"] else ("–", None)
    within = f"[{bounds[0]:.3f}, {bounds[1]:.3f}], " if bounds else ""
    entries = [
        ("Ppl against LR-tuned " + name, own, f"{within}each at its best LR"),
        ("Worst ppl on the grid", number(subject["worst_ppl"]), f"{name} {number(reference['worst_ppl'])}"),
        ("LR sensitivity", f"{subject['lr_sensitivity']:.3f}", f"{name} {reference['lr_sensitivity']:.3f} nats"),
        ("Diverged", f"{subject['diverged']}/{subject['runs']}", f"{name} {reference['diverged']}/{reference['runs']}"),
    ]
    body = "".join(f"<div><dt>{k}</dt><dd>{v}<small>{under}</small></dd></div>" for k, v, under in entries)
    return f'<dl class="tiles" aria-label="{escape(subject["arm"], quote=True)} in four numbers">{body}</dl>'


def provenance_table(provenance: Any) -> str:
    """Key/value table of whatever the results say of their origin; nested mappings become dotted keys."""
    rows = [[escape(key), f"<code>{escape(value)}</code>"] for key, value in _flat(provenance)]
    if not rows:
        return "<p>The results do not say where they come from.</p>"
    return table("Where these numbers come from", ["What", "Value"], rows, "keys")


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple) and not any(isinstance(v, Mapping) for v in value):
        yield prefix, " ".join(str(v) for v in value)
    elif value is not None:
        yield prefix or "provenance", str(value)
