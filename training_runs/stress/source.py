"""The source's table (arXiv 2605.19008) with ours beside it; blank where its public text says nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lbw_rl.training_runs.stress.suite import ADAMW, GUARD, TUNED, Suite

_NEAR = 1.2
"""A multiplier counts as another one up to this factor: the grid's 3 stands for 10/3."""


@dataclass(frozen=True)
class Claim:
    """A row of the source's table: a perplexity or a time, under AdamW and under its LBW-Guard.

    Attributes:
        what: the row's name.
        adamw, guard, change: as the source prints them; empty where it does not.
        multiplier: the row's rate as a multiple of the reference's, 3e-4 in our recipes; the source does not give its own.
        clip: of the baseline.
        field: what of our runs goes beside it.
    """

    what: str
    adamw: str = ""
    guard: str = ""
    change: str = ""
    multiplier: float = 1.0
    clip: float | None = None
    field: str = "ppl"


ANCHOR_CLAIMS = (
    Claim("Reference perplexity", "13.21", "10.74", "−18.7 %"),
    Claim("End-to-end time", "392.54 s", "357.02 s", "1.10×", field="run_seconds"),
    Claim("LR 1e-3", "659.76", "10.33", "−98.4 %", 10 / 3),
    Claim("LR 3e-3", "1885.24", "11.57", "−99.4 %", 10.0),
    Claim("LR 3e-3, AdamW + clip 0.5", "does not reproduce LBW-Guard's", "", "", 10.0, 0.5),
    Claim("LR 3e-3, AdamW + clip 1.0", "does not reproduce LBW-Guard's", "", "", 10.0, 1.0),
)


def source_table(suite: Suite, families: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows, as JSON data.

    Args:
        suite: says which families stand for which rows.
        families: `name` and `arms` (measures) of those that were run.

    Returns:
        A row each: `what`; the source's `adamw`, `guard`, `change` as printed; `where` ours come from; `field`
        ("ppl" or "run_seconds"); `ours_adamw`, `ours_guard` (None where there is no such run).
    """
    run = {family["name"]: {arm["arm"]: arm for arm in family["arms"]} for family in families}
    anchors = [name for name in suite.anchors if name in run] or list(suite.anchors[:1])
    rows = [_row(claim, anchor, run.get(anchor, {})) for anchor in anchors for claim in ANCHOR_CLAIMS]
    rows += [_row(Claim(what), family, run.get(family, {})) for what, family in suite.sizes]
    if suite.full_parameter:
        claim = Claim("TinyLlama, all parameters trained")
        rows.append(_row(claim, suite.full_parameter, run.get(suite.full_parameter, {})))
    return rows


def _row(claim: Claim, family: str, arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    plain = ADAMW if ADAMW in arms else TUNED
    baseline = plain if claim.clip is None else f"{ADAMW} + clip {claim.clip}"
    ours = [_value(arms.get(label), claim) for label in (baseline, GUARD)]
    at = next((m for _, m in ours if m is not None), None)
    return {
        "what": claim.what,
        "adamw": claim.adamw,
        "guard": claim.guard,
        "change": claim.change,
        "field": claim.field,
        "family": family,
        "multiplier": at,
        "baseline": baseline,
        "ours_adamw": ours[0][0],
        "ours_guard": ours[1][0],
    }


def _value(arm: Mapping[str, Any] | None, claim: Claim) -> tuple[float | None, float | None]:
    """Ours, and the multiplier that stands for the row's."""
    if arm is None:
        return None, None
    near = [m for m in arm["multipliers"] if max(m / claim.multiplier, claim.multiplier / m) <= _NEAR]
    if not near:
        return None, None
    multiplier = min(near, key=lambda m: abs(math.log(m / claim.multiplier)))
    if claim.field != "ppl":
        return arm.get(claim.field), multiplier
    return math.exp(min(arm["losses"][arm["multipliers"].index(multiplier)], 700.0)), multiplier
