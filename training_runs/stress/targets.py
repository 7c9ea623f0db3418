"""What the suite is to show, and whether it does: measured value, target, met or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from lbw_rl.training_runs.summary import UNGOVERNED

Arms = Mapping[str, Mapping[str, Any]]
"""Label → an arm's measures, of one family."""

NEVER = math.inf
"""A value that no limit admits: the target was never reached."""

RIVAL = 1.1
"""Largest perplexity, × tuned AdamW's and at its best multiplier, of an optimizer that counts as a rival."""


@dataclass(frozen=True)
class Target:
    """One claim about a governor.

    Attributes:
        id: name in `stress.json`.
        claim: in words.
        limit: the largest value that meets it.
        value: a family's arms and the governor's label → the value there; None where it cannot be had.
        over: how the families' values become one: the largest, or the geometric mean.
        strict: whether the limit itself misses the target.
    """

    id: str
    claim: str
    limit: float
    value: Callable[[Arms, str], float | None]
    over: Literal["largest", "geometric mean"] = "largest"
    strict: bool = False

    @property
    def scope(self) -> str:
        """What the measured value is over, in words."""
        return "in each family" if self.over == "largest" else "averaged over the families"

    def met(self, measured: float) -> bool:
        """Whether a measured value meets the target."""
        return measured < self.limit if self.strict else measured <= self.limit


def _measure(name: str) -> Callable[[Arms, str], float | None]:
    return lambda arms, governor: arms[governor].get(name)


def _to_target(name: str) -> Callable[[Arms, str], float | None]:
    """A time to the baseline's loss; most seeds that never reached it are one value that meets no limit."""

    def value(arms: Arms, governor: str) -> float | None:
        mine = arms[governor]
        return (NEVER if mine[name] is None else float(mine[name])) if name in mine else None

    return value


def _to_best_rival(arms: Arms, governor: str) -> float | None:
    """Sensitivity as a multiple of the flattest optimizer's without a governor, over the same multipliers.

    An optimizer that learns at no rate is flat as well: only those count that come near the baseline at their best one.
    """
    mine = arms[governor]
    rivals = [
        a["lr_sensitivity"]
        for a in arms.values()
        if a["controller"] in UNGOVERNED
        and a["multipliers"] == mine["multipliers"]
        and a["lr_sensitivity"] is not None
        and a["best"]["ratio"] <= RIVAL
    ]
    if mine["lr_sensitivity"] is None or not rivals:
        return None
    return float(mine["lr_sensitivity"]) / min(rivals) if min(rivals) > 0 else NEVER


TARGETS = (
    Target("sensitivity", "LR sensitivity, nats", 0.03, _measure("lr_sensitivity")),
    Target("sensitivity-rival", "LR sensitivity, × the flattest rival's", 0.2, _to_best_rival),
    Target("worst", "Perplexity at the worst multiplier, × tuned AdamW's", 1.03, _measure("worst_ratio")),
    Target("tuned-mean", "Perplexity at the tuned rate, × tuned AdamW's", 0.95, _measure("ratio"), "geometric mean"),
    Target("tuned-each", "Perplexity at the tuned rate, × tuned AdamW's", 1.0, _measure("ratio")),
    Target("rollbacks", "Rollbacks at the tuned rate", 0, _measure("base_rollbacks")),
    Target(
        "interventions",
        "Decisions at the tuned rate beyond modulation",
        0.01,
        _measure("beyond_modulation_share"),
        strict=True,
    ),
    Target("steps", "Steps to tuned AdamW's final loss, × its own", 0.8, _to_target("steps_ratio")),
    Target("seconds", "Seconds to tuned AdamW's final loss, × its own", 0.85, _to_target("seconds_ratio")),
)


def judge_targets(families: Sequence[Mapping[str, Any]], governor: str) -> list[dict[str, Any]]:
    """Every target, as JSON data.

    Args:
        families: with `name`, `chosen_on` and `arms` (measures) each.
        governor: label of the arm that is judged.

    Returns:
        Per target `id`, `claim`, `scope`, `limit`, `strict`, `over`; `measured` (None: not measured, or never reached) and `met` (None
        where nothing was measured); `held_out`, the same value over the families that no constant was chosen on
        (`held_out_families`); `families`, name → value; `never`, the families where the baseline's loss was never reached.
    """
    return [_judge(target, families, governor) for target in TARGETS]


def _judge(target: Target, families: Sequence[Mapping[str, Any]], governor: str) -> dict[str, Any]:
    values: dict[str, float] = {}
    held_out: dict[str, float] = {}
    for family in families:
        arms = {arm["arm"]: arm for arm in family["arms"]}
        value = target.value(arms, governor) if governor in arms else None
        if value is not None:
            values[family["name"]] = value
            if not family["chosen_on"]:
                held_out[family["name"]] = value
    measured = _together(target, list(values.values()))
    over_held_out = _together(target, list(held_out.values()))
    return {
        "id": target.id,
        "claim": target.claim,
        "scope": target.scope,
        "limit": target.limit,
        "strict": target.strict,
        "over": target.over,
        "measured": _finite(measured),
        "met": None if measured is None else target.met(measured),
        "held_out": _finite(over_held_out),
        "held_out_families": list(held_out),
        "families": {name: _finite(value) for name, value in values.items()},
        "never": [name for name, value in values.items() if value == NEVER],
    }


def _together(target: Target, values: Sequence[float]) -> float | None:
    if not values:
        return None
    if target.over == "largest":
        return max(values)
    return math.exp(fmean(math.log(v) for v in values))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
