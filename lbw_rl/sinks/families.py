"""The metric families of a governed run: names, types and meanings, generated from `SIGNALS` where a signal is meant.

Independent of any client library: the exporter, the dashboard and the documentation read the same table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from lbw_rl.signals import NAN, SIGNALS, Signal
from lbw_rl.sinks.sink import Decision
from lbw_rl.stages import MODES, Mode

PREFIX = "lbw_rl_"

_SUFFIXES = {"1": "", "s": "seconds", "°C": "celsius", "nats/token": "nats", "tokens/s": "tokens_per_second"}

Sample = tuple[tuple[str, ...], float]
"""Label values, in the order of the family's labels, and the value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What does not change from decision to decision, but for the mode.

    Attributes:
        version: of this package.
        controller: its name.
        optimizer: name of its class.
        ranks: processes that decide together.
        decide_every: optimizer steps per decision.
        planned_steps: optimizer steps planned; NaN if unknown.
        lr_scale_range: lowest and highest learning-rate scale that the authority allows.
        mode: how much of the authority is in use now.
    """

    version: str
    controller: str
    optimizer: str
    ranks: int
    decide_every: int
    planned_steps: float
    lr_scale_range: tuple[float, float]
    mode: Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The latest decision and what has to be carried along from one to the next. Never changed afterwards.

    The counts begin with the process, not with the run: a checkpoint does not hold them.

    Attributes:
        decision: the latest.
        timestamp: when, in seconds since the epoch.
        mean_loss: exponential mean of the finite losses, nats per token; NaN before the first.
        lowest_mean_loss: its lowest value so far.
        nonfinite: decisions whose loss or gradient norm was not finite.
        overruled: decisions whose executed action is not the proposed one.
    """

    decision: Decision
    timestamp: float
    mean_loss: float = NAN
    lowest_mean_loss: float = NAN
    nonfinite: int = 0
    overruled: int = 0


@dataclass(frozen=True, slots=True)
class Family:
    """One metric family.

    Attributes:
        name: in full, as Prometheus stores it.
        kind: "gauge" or "counter".
        help: what it means.
        labels: names of its labels.
        of_run: its samples, read off the run's facts; None where `of_decision` has them.
        of_decision: its samples, read off the latest decision.
    """

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    labels: tuple[str, ...] = ()
    of_run: Callable[[RunFacts], Iterable[Sample]] | None = None
    of_decision: Callable[[Seen], Iterable[Sample]] | None = None

    def samples(self, facts: RunFacts, seen: Seen | None) -> list[Sample]:
        """What there is to tell: no value that is no finite number, and nothing of a decision before the first."""
        found: Iterable[Sample] = ()
        if self.of_run is not None:
            found = self.of_run(facts)
        elif self.of_decision is not None and seen is not None:
            found = self.of_decision(seen)
        return [(tuple(map(_text, labels)), value) for labels, value in found if math.isfinite(value)]


def metric_name(signal: Signal) -> str:
    """The name of a signal's metric: Prometheus' base units as a suffix, `_ratio` for shares, `_total` for counts.

    A dimensionless number is a share, and gets `_ratio`, if it lies in [0, 1] or is a device's quantity over its
    limit; a flag ("1 if …") and a plain number get no suffix.
    """
    if signal.unit == "steps":
        return f"{PREFIX}{signal.name}s_total"
    suffix = _SUFFIXES.get(signal.unit, re.sub(r"[^a-z0-9]+", "_", signal.unit.lower().replace("/s", "_per_second")))
    is_flag = signal.definition.startswith("1 if ")
    if signal.unit == "1" and not is_flag and ((signal.low, signal.high) == (0, 1) or signal.source == "device"):
        suffix = "ratio"
    return PREFIX + (signal.name if not suffix or signal.name.endswith(suffix) else f"{signal.name}_{suffix}")


def _text(label: object) -> str:
    """A label's value, whatever a controller made it of: a lone surrogate would fail the whole scrape."""
    return str(label).encode("utf-8", "replace").decode("utf-8")


def number(value: Any) -> float:
    """A controller's number, NaN for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return NAN


def _run(name: str, text: str, value: Callable[[RunFacts], float]) -> Family:
    return Family(PREFIX + name, "gauge", text, of_run=lambda facts: [((), value(facts))])


def _gauge(name: str, text: str, value: Callable[[Seen], Any]) -> Family:
    return Family(PREFIX + name, "gauge", text, of_decision=lambda seen: [((), number(value(seen)))])


def _counter(name: str, text: str, value: Callable[[Seen], float]) -> Family:
    return Family(PREFIX + name, "counter", text, of_decision=lambda seen: [((), value(seen))])


def _signal(signal: Signal) -> Family:
    name = metric_name(signal)
    kind: Literal["gauge", "counter"] = "counter" if name.endswith("_total") else "gauge"
    return Family(
        name, kind, signal.definition, of_decision=lambda seen: [((), getattr(seen.decision.telemetry, signal.name))]
    )


def _count(key: str, text: str) -> Family:
    return _counter(f"{key}_total", text, lambda seen: seen.decision.counts.get(key, 0))


def _group_scales(seen: Seen) -> Iterable[Sample]:
    action = seen.decision.executed
    return [((str(i),), action.lr_scale * scale) for i, scale in enumerate(action.group_lr_scales)]


def _proposed(seen: Seen, name: str) -> Any:
    proposed = seen.decision.proposed
    return NAN if proposed is None else getattr(proposed, name)


SIGNAL_FAMILIES: dict[str, Family] = {name: _signal(signal) for name, signal in SIGNALS.items()}
"""Signal → its family."""

FAMILIES: tuple[Family, ...] = (
    Family(
        PREFIX + "run_info",
        "gauge",
        "always 1: who governs what",
        ("version", "controller", "optimizer"),
        of_run=lambda facts: [((facts.version, facts.controller, facts.optimizer), 1.0)],
    ),
    Family(
        PREFIX + "mode",
        "gauge",
        "1 for the mode that governance is in, 0 for the others",
        ("mode",),
        of_run=lambda facts: [((mode,), float(mode == facts.mode)) for mode in MODES],
    ),
    Family(
        PREFIX + "authority_lr_scale",
        "gauge",
        "range of the learning-rate scale that the authority allows",
        ("bound",),
        of_run=lambda facts: zip((("low",), ("high",)), facts.lr_scale_range),
    ),
    _run("planned_steps", "optimizer steps planned, where that is known", lambda facts: facts.planned_steps),
    _run("decide_every_steps", "optimizer steps per decision", lambda facts: facts.decide_every),
    _run("ranks", "processes that decide together", lambda facts: facts.ranks),
    *SIGNAL_FAMILIES.values(),
    _gauge(
        "mean_loss_nats",
        "exponential mean of the finite training losses, with a half-life of 20 decisions, since the process began",
        lambda seen: seen.mean_loss,
    ),
    _gauge(
        "lowest_mean_loss_nats",
        "lowest value that the mean loss has had since the process began",
        lambda seen: seen.lowest_mean_loss,
    ),
    _gauge(
        "executed_lr_scale",
        "learning-rate scale that the latest decision executes",
        lambda seen: seen.decision.executed.lr_scale,
    ),
    _gauge(
        "executed_momentum_scale",
        "momentum scale that the latest decision executes",
        lambda seen: seen.decision.executed.momentum_scale,
    ),
    _gauge(
        "proposed_lr_scale",
        "learning-rate scale that the controller asked for, before the authority; absent if it gave none",
        lambda seen: _proposed(seen, "lr_scale"),
    ),
    _gauge(
        "proposed_momentum_scale",
        "momentum scale that the controller asked for, before the authority; absent if it gave none",
        lambda seen: _proposed(seen, "momentum_scale"),
    ),
    Family(
        PREFIX + "executed_group_lr_scale",
        "gauge",
        "whole learning-rate scale of each parameter group, by its index, where groups are scaled apart",
        ("group",),
        of_decision=_group_scales,
    ),
    _count("decisions", "decisions of the run"),
    _count("interventions", "decisions whose action was not neutral"),
    _count("skips", "updates that were withheld"),
    _count("rollbacks", "returns to the last good state"),
    _count("hand_overs", "decisions that were executed as SGD with momentum"),
    _counter(
        "overruled_decisions_total",
        "decisions whose executed action is not the proposed one, since the process began",
        lambda seen: seen.overruled,
    ),
    _counter(
        "nonfinite_decisions_total",
        "decisions whose loss or gradient norm was NaN or infinite, since the process began",
        lambda seen: seen.nonfinite,
    ),
    Family(
        PREFIX + "faults_total",
        "counter",
        "faults of governance, which the run survived",
        ("source",),
        of_decision=lambda seen: [((source,), n) for source, n in seen.decision.faults.items()],
    ),
    Family(
        PREFIX + "decisions_by_regime_total",
        "counter",
        "decisions by the regime that the controller saw",
        ("regime",),
        of_decision=lambda seen: [((regime,), n) for regime, n in seen.decision.regimes.items()],
    ),
    Family(
        PREFIX + "regime",
        "gauge",
        "1 for the regime of the latest decision, 0 for the others seen so far",
        ("regime",),
        of_decision=lambda seen: [
            ((regime,), float(regime == seen.decision.ruled.regime)) for regime in seen.decision.regimes
        ],
    ),
    Family(
        PREFIX + "evidence",
        "gauge",
        "numbers that the controller gave as evidence for the latest decision; absent where it gave none",
        ("name",),
        of_decision=lambda seen: [((name,), number(v)) for name, v in seen.decision.ruled.evidence.items()],
    ),
    _gauge(
        "suspended",
        "1 if the controller has lost its authority after too many faults, else 0",
        lambda seen: seen.decision.suspended,
    ),
    _gauge(
        "skip_budget_spent",
        "1 if the authority allows skips but has none left in its window, else 0",
        lambda seen: seen.decision.skip_budget_spent,
    ),
    _counter(
        "overhead_seconds_total",
        "wall time spent in governance, up to the latest decision",
        lambda seen: seen.decision.overhead_seconds,
    ),
    _gauge("last_decision_timestamp_seconds", "when the latest decision was taken", lambda seen: seen.timestamp),
)
"""Every family that a scrape may hold."""
