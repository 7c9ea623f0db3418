"""Runs the telemetry of a ledger through another controller: what would it have done?"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lbw_rl.action import Directive
from lbw_rl.authority import Authority
from lbw_rl.controller import Context, Controller
from lbw_rl.enforcer import Enforcer
from lbw_rl.ledger import LEDGER_SCHEMA, read_ledger
from lbw_rl.sgd_rate import SgdRate
from lbw_rl.signals import Telemetry


@dataclass(frozen=True)
class Replay:
    """A controller's answers to recorded telemetry.

    The telemetry is that of the run as it was executed, so each answer is what the controller would have done at
    that moment, not where the run would have gone under it.

    Attributes:
        recorded_controller: who governed the recorded run.
        decisions: decisions replayed.
        differing: decisions whose learning-rate scale differs by more than 5 % or whose directive or hand-over differs.
        regimes: the replayed controller's regime → decisions.
        faults: decisions in which it raised or answered nonsense.
        passages: where they differ, as stretches of consecutive decisions in one regime with one directive: `first` and
            `last` step, `regime`, `directive`, `hand_over` (to SGD), and the mean (geometric) of the `recorded` and the `replayed` scale.
        steps: one record per decision: step, recorded and replayed scale, directives and regime.
    """

    recorded_controller: str
    decisions: int
    differing: int
    regimes: dict[str, int]
    faults: int
    passages: list[dict[str, Any]]
    steps: list[dict[str, Any]] = field(repr=False)


def replay(ledger: str | Path, controller: Controller) -> Replay:
    """Replays a ledger.

    Args:
        ledger: a `ledger.jsonl`.
        controller: who is to answer; reset first.

    Raises:
        ValueError: the file is missing, damaged, of another schema, or without a decision.
    """
    records = read_ledger(ledger)
    header = next(records, None)
    if header is None or header["type"] != "header":
        raise ValueError(
            f"ledger: {ledger} does not start with a header; accepted: a ledger.jsonl that a governed run wrote"
        )
    if header.get("schema") != LEDGER_SCHEMA:
        raise ValueError(f"ledger: schema is {header.get('schema')!r}; this version reads {LEDGER_SCHEMA}")
    context = _context(header, ledger)
    controller.reset(context)
    enforcer, sgd_rate = Enforcer(context.authority), SgdRate()
    steps = []
    for record in records:
        if record["type"] == "header":  # of another controller, or of the same one in another context
            raise ValueError(f"ledger: {ledger} holds several runs; accepted: one run a ledger")
        if record["type"] != "decision":
            continue
        telemetry, step = _recorded(record, ledger)
        proposed, fault = None, None
        try:
            proposed = controller.act(telemetry)
        except Exception as e:  # as the governor would: a broken controller is a finding, not a crash
            fault = f"{type(e).__name__}: {e}"
        sgd_rate.update(telemetry)
        ruling = enforcer.rule(proposed, fault, no_hand_over=sgd_rate.unknown)
        if step["recorded_directive"] != Directive.PROCEED or record.get("withheld_on_device"):
            sgd_rate.withheld()
        steps.append(
            {
                **step,
                "replayed_lr_scale": ruling.action.lr_scale,
                "replayed_directive": str(ruling.action.directive),
                "replayed_hand_over": ruling.action.hand_over,
                "regime": ruling.action.regime,
                "reasons": list(ruling.reasons),
            }
        )
    if not steps:
        raise ValueError(f"ledger: {ledger} holds no decision")
    return Replay(
        recorded_controller=str(header.get("controller")),
        decisions=len(steps),
        differing=sum(_differs(s) for s in steps),
        regimes=dict(Counter(s["regime"] for s in steps)),
        faults=enforcer.faults,
        passages=_passages(steps),
        steps=steps,
    )


def _context(header: dict[str, Any], ledger: str | Path) -> Context:
    try:
        recorded = header["context"]
        return Context(
            total_steps=recorded["total_steps"],
            decide_every=recorded["decide_every"],
            authority=Authority(**recorded["authority"]),
            seed=recorded["seed"],
            groups=tuple(recorded.get("groups", ())),
            weights=recorded.get("weights"),
            low_rank=bool(recorded.get("low_rank", False)),
            momentum=recorded.get("momentum"),
            normalised=bool(recorded.get("normalised", True)),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"ledger: the header of {ledger} is damaged ({_brief(e)})") from e


def _recorded(record: dict[str, Any], ledger: str | Path) -> tuple[Telemetry, dict[str, Any]]:
    """A decision's telemetry, and what was executed."""
    try:
        executed = record["executed"]
        scale = float(executed["lr_scale"])
        if not 0 < scale < math.inf:
            raise ValueError("executed.lr_scale must be > 0 and finite")
        return Telemetry.from_dict(record["telemetry"]), {
            "step": int(record["step"]),
            "recorded_lr_scale": scale,
            "recorded_directive": str(executed["directive"]),
            "recorded_hand_over": bool(executed.get("hand_over", False)),
        }
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(
            f"ledger: the decision at step {record.get('step')} of {ledger} is damaged ({_brief(e)})"
        ) from e


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _passages(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stretches of consecutive differing decisions of one kind."""
    passages = []
    kind = lambda s: (_differs(s), s["regime"], s["replayed_directive"], s["replayed_hand_over"])  # noqa: E731
    for (differs, regime, directive, hand_over), group in itertools.groupby(steps, kind):
        stretch = list(group)
        if differs:
            passages.append(
                {
                    "first": stretch[0]["step"],
                    "last": stretch[-1]["step"],
                    "regime": regime,
                    "directive": directive,
                    "hand_over": hand_over,
                    "recorded": statistics.geometric_mean(s["recorded_lr_scale"] for s in stretch),
                    "replayed": statistics.geometric_mean(s["replayed_lr_scale"] for s in stretch),
                }
            )
    return passages


def _differs(step: dict[str, Any]) -> bool:
    ratio = math.log(step["replayed_lr_scale"] / step["recorded_lr_scale"])
    return abs(ratio) > 0.05 or any(
        step[f"recorded_{what}"] != step[f"replayed_{what}"] for what in ("directive", "hand_over")
    )
