"""The report's sentences: the verdict, computed from the numbers, and the sources' claims beside ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

from lbw_rl.training_runs import whole_record
from lbw_rl.training_runs.code_version import in_words, runs_by_code
from lbw_rl.training_runs.report_figures import multiplier_label
from lbw_rl.training_runs.report_tables import Record, multiple, number, ratio, table
from lbw_rl.training_runs.results import Row
from lbw_rl.training_runs.summary import UNGOVERNED
from lbw_rl.training_runs.whole_record import Lacking

VERDICT_WORDS = {
    "worse": "higher",
    "unresolved": "not separated",
    "no interval": "no interval",
}


def verdict(recipe: str, summary: Mapping[str, Any], several: bool) -> str:
    """A paragraph on one recipe: whom each subject beat, whom it did not, and how flat its LR axis is."""
    arms = {a["arm"]: a for a in summary["arms"] if a["recipe"] == recipe}
    subjects = [s for s in summary["subjects"] if s in arms]
    opening = f"<b>{escape(recipe)}.</b> " if several else ""
    if not subjects:
        flattest = min(arms.values(), key=lambda a: a["lr_sensitivity"])
        return (
            f"<p>{opening}No governed arm is in this comparison. Flattest over the learning rate: "
            f"{_arm(flattest['arm'])} ({flattest['lr_sensitivity']:.3f} nats).</p>"
        )
    paragraphs = []
    for subject in subjects:
        compared = [c for c in summary["comparisons"] if c["recipe"] == recipe and c["arm"] == subject]
        paragraphs.append(f"<p>{opening}{_against(subject, compared)} {_flatness(arms[subject], arms, summary)}</p>")
        opening = ""
    return "".join(paragraphs)


def mixed_code(rows: Sequence[Row]) -> str:
    """A warning where the rows are of several versions of the code; nothing where they are of one."""
    runs = runs_by_code(rows)
    if len(runs) == 1:
        return ""
    return (
        f'<p class="note"><strong class="missing">Runs of {len(runs)} versions of the code ({escape(in_words(runs))}): '
        "what differs between arms may differ between versions.</strong></p>"
    )


def lacking_records(lacking: Lacking) -> str:
    """A warning that names the runs with incomplete records; nothing where all are whole."""
    if not lacking:
        return ""
    return (
        f'<p class="note"><strong class="missing">Incomplete records of {len(lacking)} run{"s" * (len(lacking) > 1)}, as a full '
        f"disk leaves them: {escape(whole_record.in_words(lacking))}.</strong> Final losses stand; what is read off these "
        "records, as the time to a loss, leaves them out.</p>"
    )


def _against(subject: str, compared: Sequence[Record]) -> str:
    pairs = [c for c in compared if c["same_lr"]["ratio"] is not None]
    if not pairs:
        return f"{_arm(subject)} shares no seed with any other arm: nothing to compare."
    seeds = {c["same_lr"]["n"] for c in pairs}
    span = [m for c in pairs for m in c["multipliers"]]
    setting = (
        f"at the same learning rate ({multiplier_label(min(span))} to {multiplier_label(max(span))} the base, "
        f"mean over the grid, {_range(seeds)} paired seed{'s' * (max(seeds) > 1)})"
    )
    if max(seeds) == 1:
        lower = [c for c in pairs if c["same_lr"]["ratio"] < 1]
        higher = [c for c in pairs if c["same_lr"]["ratio"] >= 1]
        text = f"With one seed there is no interval, so nothing here is shown to be better or worse: {setting} "
        text += f"the perplexity of {_arm(subject)} was lower than that of {_list(lower)}"
        return text + (f" and not lower than that of {_list(higher)}." if higher else ".")
    beaten = [c for c in pairs if c["same_lr"]["verdict"] == "better"]
    unbeaten = [c for c in pairs if c["same_lr"]["verdict"] != "better"]
    text = f"{_arm(subject)} beat {len(beaten)} of {len(pairs)} other arms on perplexity {setting}"
    text += f": {_list(beaten)}." if beaten else "."
    if unbeaten:
        text += f" It did <b>not</b> beat {_list(unbeaten, explain=True)}."
    tuned = [c for c in pairs if c["each_tuned"]["verdict"] == "better"]
    losing = [c for c in pairs if c["each_tuned"]["verdict"] == "worse"]
    open_ = [c for c in pairs if c["each_tuned"]["verdict"] in ("unresolved", "no interval")]
    text += " With each arm at its own best learning rate"
    text += f" it beat {_list(tuned, 'each_tuned')}" if tuned else " it beat none"
    text += f", lost to {_list(losing, 'each_tuned')}" if losing else ""
    return text + (f", and was not separated from {_list(open_, 'each_tuned')}." if open_ else ".")


def _flatness(subject: Record, arms: Mapping[str, Record], summary: Mapping[str, Any]) -> str:
    # The same multipliers, or the two means are not comparable.
    comparable = [a for a in arms.values() if a["multipliers"] == subject["multipliers"]]
    flattest = min(comparable, key=lambda a: a["lr_sensitivity"])
    text = f"Its LR sensitivity is {subject['lr_sensitivity']:.3f} nats"
    if flattest["arm"] == subject["arm"]:
        text += ", the lowest of all" if len(comparable) > 1 else ""
    else:
        text += f"; the lowest is that of {_arm(flattest['arm'])}, {flattest['lr_sensitivity']:.3f}"
    reference = arms.get(summary["reference_arm"])
    if reference and reference is not flattest and reference is not subject:
        text += f" ({escape(reference['arm'])}: {reference['lr_sensitivity']:.3f})"
    return text + f". {subject['diverged']} of its {subject['runs']} runs diverged."


def _list(compared: Sequence[Record], key: str = "same_lr", explain: bool = False) -> str:
    parts = []
    for c in compared:
        judged = c[key]
        inside = f"{ratio(judged)}, {VERDICT_WORDS[judged['verdict']]}" if explain else multiple(judged["ratio"])
        parts.append(f'{_arm(c["against"])} <span class="q">({inside})</span>')
    if not parts:
        return "no arm"
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]


def _arm(name: str) -> str:
    return f'<b class="arm">{escape(name)}</b>'


def _range(values: set[int]) -> str:
    return f"{min(values)}" if len(values) == 1 else f"{min(values)} to {max(values)}"


def guard_claims(recipe: str, rows: Sequence[Row], reference_arm: str, tuned: float | None) -> str:
    """The LBW-Guard paper's table beside ours for one recipe."""
    mine = [r for r in rows if r.recipe == recipe]
    guard = next((r.arm for r in mine if r.controller == "lbw-guard"), None)
    clip = next((r.arm for r in mine if "clip" in r.arm.lower() and r.controller in UNGOVERNED), None)
    grid = sorted({r.lr_multiplier for r in mine})
    stressed = [m for m in grid if m > 1]
    largest = stressed[-1] if stressed else None
    second = stressed[-2] if len(stressed) > 1 else None
    pick = _Picker(mine)
    best = pick.best(guard)
    places = [f"{escape(a)} {multiplier_label(m)}" for a, m in ((reference_arm, tuned), (guard, best)) if a and m]
    lines = [
        _claim("Reference LR", "13.21", "10.74", "−18.7 %", pick(reference_arm, 1.0), pick(guard, 1.0), "1×"),
        _claim("LR-tuned baseline", "not given", "–", "–", pick(reference_arm, tuned), pick(guard, best), "best LRs: " + ", ".join(places)),
        _claim("Stress: LR 1e-3", "659.76", "10.33", "−98.4 %", pick(reference_arm, second), pick(guard, second), pick.lr(second)),
        _claim("Stress: LR 3e-3", "1885.24", "11.57", "−99.4 %", pick(reference_arm, largest), pick(guard, largest), pick.lr(largest)),
        _claim("Gradient clipping under stress", "does not reproduce it", "–", "–", pick(clip, largest), pick(guard, largest), f"{escape(clip or 'no clipping arm')}, {pick.lr(largest)}"),
    ]  # fmt: skip
    seconds = pick(reference_arm, 1.0, "seconds"), pick(guard, 1.0, "seconds")
    speed = f"{seconds[0] / seconds[1]:.2f}×" if seconds[0] and seconds[1] else "–"
    times = [f"{number(s)} s" if s else "–" for s in seconds]
    lines.append(["End-to-end time", "392.54 s", "357.02 s", "1.10×", *times, f"{speed}<small>1×</small>"])
    head = [
        "Final perplexity",
        "Paper<small>AdamW</small>",
        "Paper<small>LBW-Guard</small>",
        "Paper<small>change</small>",
    ]
    head += [f"Ours<small>{escape(reference_arm)}</small>", f"Ours<small>{escape(guard or 'no lbw-guard arm')}</small>"]
    return table(f"The LBW-Guard paper beside {escape(recipe)}", [*head, "Ours<small>change</small>"], lines, "claims")


def entropic_claims(recipe: str, rows: Sequence[Row], reference_arm: str, utilization: float | None) -> str:
    """The EntroPIC text's claims beside ours for one recipe."""
    mine = [r for r in rows if r.recipe == recipe]
    arm = next((r.arm for r in mine if r.controller == "entropic"), None)
    pick = _Picker(mine)
    ours, base = pick(arm, 1.0, "final_ppl"), pick(reference_arm, 1.0, "final_ppl")
    reach, base_reach = pick(arm, 1.0, "steps_to_target"), pick(reference_arm, 1.0, "steps_to_target")
    pairs = f"{number(base)} → {number(ours)}" if ours and base else ""
    steps = (
        f"{base_reach:g} → {reach:g} steps to target"
        if reach and base_reach
        else "target not reached by both"
        if arm
        else ""
    )
    used = "no accelerator was measured" if utilization is None else "median of its decisions"
    lines = [
        ["Shorter training", "−37 %<small>120 → 75 epochs</small>", _change(base_reach, reach, steps)],
        ["Perplexity", "12 % better", _change(base, ours, pairs)],
        ["Zero-shot accuracy", "+8.6 %", "–<small>not measured by this suite</small>"],
        ["GPU utilisation", "≥ 92 %", f"{'–' if utilization is None else f'{utilization:.0%}'}<small>{used}</small>"],
    ]
    contenders = f"{escape(arm)} against {escape(reference_arm)} at 1×" if arm else "no entropic arm"
    ours_head = f"Ours<small>{contenders}</small>"
    return table(f"The EntroPIC text beside {escape(recipe)}", ["Claim", "Text", ours_head], lines, "claims")


class _Picker:
    """Median of a field over the seeds of one arm at one multiplier; `None` where there is no such run."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __call__(self, arm: str | None, multiplier: float | None, field: str = "final_ppl") -> float | None:
        runs = [r for r in self.rows if r.arm == arm and r.lr_multiplier == multiplier]
        values = [math.inf if (v := getattr(r, field)) is None else v for r in runs]  # a target never reached
        return median(values) if values and math.isfinite(median(values)) else None

    def best(self, arm: str | None) -> float | None:
        grid = {r.lr_multiplier for r in self.rows if r.arm == arm}
        return min(grid, key=lambda m: self(arm, m) or math.inf) if grid else None

    def lr(self, multiplier: float | None) -> str:
        if multiplier is None:
            return "the grid has no such multiplier"
        return f"{multiplier_label(multiplier)}, LR {self.rows[0].base_lr * multiplier:.2g}"


def _claim(
    what: str, theirs: str, guarded: str, change: str, ours: float | None, ours_guarded: float | None, at: str
) -> list[str]:
    return [what, theirs, guarded, change, number(ours), number(ours_guarded), _change(ours, ours_guarded, at)]


def _change(before: float | None, after: float | None, under: str) -> str:
    shown = f"{after / before - 1:+.1%}".replace("-", "−").replace("%", " %") if before and after else "–"
    return f"{shown}<small>{under}</small>"
