"""What the dashboard shows: rows of panels, those of single signals generated from `SIGNALS`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lbw_rl.entropy import ESTIMATORS
from lbw_rl.signals import SIGNALS, Signal
from lbw_rl.sinks.families import metric_name

RUN = 'job=~"$job", instance=~"$instance"'
"""Selects the runs that the reader has chosen at the top of the dashboard."""

_UNITS = {"s": "s", "°C": "celsius", "nats/token": "suffix: nats", "tokens/s": "suffix: tokens/s"}
_ROW_OF_SOURCE = {"device": "GPU and host"}


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression and the legend of its lines."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    Attributes:
        title, description: for the reader.
        queries: what it shows.
        unit: Grafana's name of the unit.
        kind: Grafana's name of the visualisation.
        width: of 24 columns.
        options: further entries of the field's defaults.
        dashed: legends that are drawn as dashed lines: bounds and targets.
        names_only: whether a "stat" shows the legend and not the number.
    """

    title: str
    description: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    dashed: tuple[str, ...] = ()
    names_only: bool = False


def of_run(name: str, extra: str = "") -> str:
    """The selector of a metric of the chosen runs; `extra` are further matchers."""
    matchers = f"{RUN}, {extra}" if extra else RUN
    return f"lbw_rl_{name}{{{matchers}}}"


def _evidence(name: str) -> str:
    selector = of_run("evidence", f'name="{name}"')
    return f"sum without (name) ({selector})"


def _rate(name: str, extra: str = "") -> str:
    return f"rate({of_run(name, extra)}[$__rate_interval])"


def _stat(title: str, description: str, expr: str, unit: str = "short", **options: Any) -> Panel:
    return Panel(title, description, (Query(expr, "{{instance}}"),), unit, "stat", 4, options)


def _colours(below: str, from_there_on: str, value: int) -> dict[str, Any]:
    steps = [{"color": below, "value": None}, {"color": from_there_on, "value": value}]
    return {"color": {"mode": "thresholds"}, "thresholds": {"mode": "absolute", "steps": steps}}


def _of_signal(signal: Signal) -> Panel:
    name = metric_name(signal)
    is_share = name == f"lbw_rl_{signal.name}_ratio"
    unit = "percentunit" if is_share else _UNITS.get(signal.unit, "short")
    title = signal.name.replace("_", " ")
    expr = f"{name}{{{RUN}}}"
    return Panel(title, signal.definition, (Query(expr, "{{instance}}"),), unit)


def _log() -> dict[str, Any]:
    return {"custom": {"scaleDistribution": {"type": "log", "log": 10}}}


_THE_RUN = (
    _stat("Progress", "Share of the planned steps that is done.", of_run("progress_ratio"), "percentunit"),
    _stat("Steps", "Optimizer steps attempted.", of_run("steps_total")),
    _stat("Mean loss", "Exponential mean of the training loss.", of_run("mean_loss_nats"), "suffix: nats"),
    _stat(
        "Since the last decision",
        "Where this grows, the run stands still or governance has been let go.",
        f"time() - {of_run('last_decision_timestamp_seconds')}",
        "s",
        **_colours("green", "red", 300),
    ),
    _stat(
        "Suspended", "1 if the controller has lost its authority.", of_run("suspended"), **_colours("green", "red", 1)
    ),
    Panel(
        "Mode",
        "How much of its authority governance uses now.",
        (Query(f"{of_run('mode')} == 1", "{{mode}}"),),
        kind="stat",
        width=4,
        names_only=True,
    ),
    Panel(
        "Training loss",
        "Loss of the latest decision, its exponential mean, and the lowest that the mean has been.",
        (
            Query(of_run("loss_nats"), "loss {{instance}}"),
            Query(of_run("mean_loss_nats"), "mean {{instance}}"),
            Query(of_run("lowest_mean_loss_nats"), "lowest mean {{instance}}"),
        ),
        "suffix: nats",
        width=12,
        dashed=("lowest mean.*",),
    ),
    Panel(
        "Learning-rate scale",
        "Multiple of the scheduled rate: asked for, executed, and the authority's bounds.",
        (
            Query(of_run("executed_lr_scale"), "executed {{instance}}"),
            Query(of_run("proposed_lr_scale"), "proposed {{instance}}"),
            Query(of_run("authority_lr_scale"), "bound {{bound}} {{instance}}"),
        ),
        width=12,
        options=_log(),
        dashed=("bound.*",),
    ),
    Panel(
        "Learning rate",
        "What the schedule says, and what the optimizer gets.",
        (
            Query(of_run("learning_rate"), "scheduled {{instance}}"),
            Query(f"{of_run('learning_rate')} * {of_run('executed_lr_scale')}", "executed {{instance}}"),
        ),
        options=_log(),
        dashed=("scheduled.*",),
    ),
    Panel(
        "Momentum scale",
        "Multiple of the momentum's averaging horizon.",
        (
            Query(of_run("executed_momentum_scale"), "executed {{instance}}"),
            Query(of_run("proposed_momentum_scale"), "proposed {{instance}}"),
        ),
    ),
    Panel(
        "Throughput",
        "Training tokens a second, on this rank.",
        (Query(of_run("tokens_per_second"), "{{instance}}"),),
        "suffix: tokens/s",
    ),
)

_ENTROPY = (
    Panel(
        "Gradient entropy and its target",
        "What EntroPIC holds, its target, and the band of the alert: 0.8 to 1.2 times the target. Empty under controllers "
        "that have no such target.",
        (
            Query(_evidence("entropy"), "entropy {{instance}}"),
            Query(_evidence("target"), "target {{instance}}"),
            Query(f"0.8 * {_evidence('target')}", "band low {{instance}}"),
            Query(f"1.2 * {_evidence('target')}", "band high {{instance}}"),
        ),
        width=12,
        dashed=("target.*", "band.*"),
    ),
    Panel(
        "Entropy by estimator",
        "Every estimator of the gradient's entropy, whoever governs. Low element entropy with a direction entropy near 1: the "
        "rate is too high. Low ones of both: too low. The source's softmax reads 1 whatever happens.",
        tuple(Query(of_run(f"{signal}_ratio"), f"{name} {{{{instance}}}}") for name, (signal, _) in ESTIMATORS.items()),
        width=12,
    ),
    Panel(
        "Output of the law",
        "The controller's other evidence: for EntroPIC α, which is ln(scale) over its gain, and the direction entropy.",
        (Query(of_run("evidence", 'name!~"entropy|target"'), "{{name}} {{instance}}"),),
        width=24,
    ),
)

_DECISIONS = (
    Panel(
        "Regime",
        "The state that the controller sees.",
        (Query(of_run("regime"), "{{regime}} {{instance}}"),),
        kind="state-timeline",
        width=12,
        options=_colours("transparent", "blue", 1),
    ),
    Panel(
        "Decisions by regime",
        "Share of the latest decisions.",
        (
            Query(
                f"{_rate('decisions_by_regime_total')} / ignoring (regime) group_left {_rate('decisions_total')}",
                "{{regime}} {{instance}}",
            ),
        ),
        "percentunit",
        width=12,
        options={"custom": {"stacking": {"mode": "normal"}, "fillOpacity": 40}},
    ),
    Panel(
        "Interventions",
        "Share of the latest decisions that were not neutral, and of those that the authority, the mode or a fault changed.",
        (
            Query(f"{_rate('interventions_total')} / {_rate('decisions_total')}", "interventions {{instance}}"),
            Query(f"{_rate('overruled_decisions_total')} / {_rate('decisions_total')}", "overruled {{instance}}"),
        ),
        "percentunit",
        options={"max": 1},
    ),
    Panel(
        "Skips, rollbacks, hand-overs, non-finite decisions",
        "So far.",
        (
            Query(of_run("skips_total"), "skips {{instance}}"),
            Query(of_run("rollbacks_total"), "rollbacks {{instance}}"),
            Query(of_run("hand_overs_total"), "hand-overs {{instance}}"),
            Query(of_run("nonfinite_decisions_total"), "non-finite {{instance}}"),
        ),
    ),
    Panel(
        "Skip budget spent",
        "1 while the authority would deny a skip.",
        (Query(of_run("skip_budget_spent"), "{{instance}}"),),
    ),
    Panel(
        "Faults of governance",
        "By source, so far; empty if there were none. The run has survived each of them.",
        (Query(of_run("faults_total"), "{{source}} {{instance}}"),),
        width=12,
    ),
    Panel(
        "Scale of each parameter group",
        "Where the controller scales groups apart; empty elsewhere.",
        (Query(of_run("executed_group_lr_scale"), "group {{group}} {{instance}}"),),
        width=12,
        options=_log(),
    ),
)

_COST = (
    Panel(
        "Share of time spent in governance",
        "Of all wall time, evaluations included.",
        (Query(_rate("overhead_seconds_total"), "{{instance}}"),),
        "percentunit",
    ),
    Panel(
        "Time of the collective",
        "One per decision, waiting for slow ranks included; empty for a process that trains alone.",
        (Query(of_run("collective_seconds"), "{{instance}}"),),
        "s",
    ),
    Panel("Time of a step", "Mean over the window.", (Query(of_run("step_seconds"), "{{instance}}"),), "s"),
    Panel(
        "Time of a scrape",
        "As Prometheus measures it; the run does not wait for it.",
        (Query(f"scrape_duration_seconds{{{RUN}}}", "{{instance}}"),),
        "s",
    ),
    Panel(
        "Who governs what",
        "Version, controller, optimizer.",
        (Query(of_run("run_info"), "{{instance}}: {{controller}} over {{optimizer}}, lbw-rl {{version}}"),),
        kind="stat",
        names_only=True,
    ),
    Panel(
        "Set-up",
        "Planned steps, steps per decision, processes.",
        (
            Query(of_run("planned_steps"), "planned steps {{instance}}"),
            Query(of_run("decide_every_steps"), "steps per decision {{instance}}"),
            Query(of_run("ranks"), "ranks {{instance}}"),
        ),
        kind="stat",
    ),
)

_PLACED = {"step", "progress", "learning_rate", "lr_scale", "momentum_scale", "loss", "tokens_per_second"}
_PLACED |= {"step_seconds", "collective_seconds", *(signal for signal, _ in ESTIMATORS.values())}
"""Signals that a panel above shows; the scales of the previous step are the ones executed there."""


def rows() -> dict[str, tuple[Panel, ...]]:
    """Title → panels, top to bottom."""
    signals: dict[str, list[Panel]] = {"Gradient and optimizer": [], "GPU and host": []}
    for name, signal in SIGNALS.items():
        if name not in _PLACED:
            signals[_ROW_OF_SOURCE.get(signal.source, "Gradient and optimizer")].append(_of_signal(signal))
    return {
        "The run": _THE_RUN,
        "Entropy": _ENTROPY,
        "Gradient and optimizer": tuple(signals["Gradient and optimizer"]),
        "Regimes and interventions": _DECISIONS,
        "GPU and host": tuple(signals["GPU and host"]),
        "Cost of governance": _COST,
    }
