"""`lbw-rl stress`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lbw_rl.cli.console import emit_json, meter, out

if TYPE_CHECKING:
    from lbw_rl.training_runs.stress.plan import Plan

EPILOG = (
    "Examples: `lbw-rl stress --budget quick --out stress` · "
    "`lbw-rl stress --budget full --out stress --resume` adds what the larger budget lacks · "
    "`lbw-rl stress --suite qwen2.5 --set model.path=PATH --dry-run` lists every run"
)


def stress(
    suite: Annotated[
        str,
        typer.Option(
            help="mini: on two CPU cores; qwen2.5, tinyllama: the source's own rates and clips, on models of real size."
        ),
    ] = "mini",
    budget: Annotated[str, typer.Option(help="quick: a preview; full: all families, rates and seeds.")] = "quick",
    families: Annotated[
        str | None, typer.Option(help="Comma-separated families instead of the budget's; see --dry-run.")
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Output folder; must be new or empty unless --resume.")] = Path(
        "stress"
    ),
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe setting in every family; repeatable."),
    ] = None,
    backend: Annotated[str, typer.Option(help="local processes, or ray.")] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Local processes; default: one per core (mini), or one.", min=1)
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on in --out, also with another budget or families; repeats no finished run."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List every run with its settings, and start none.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Stress the learning rate from 1/30 to 100 times the tuned one: the governor against tuned AdamW and the strongest rivals.

    Tunes AdamW over rate and schedule in every family, runs every arm at every multiplier and seed, and judges the
    governor: OUT/report.html, stress.json, results.json, tuning.json.
    """
    from lbw_rl.training_runs.stress.plan import Plan
    from lbw_rl.training_runs.stress.suite import budget_named, suite_named

    chosen = suite_named(suite)
    wanted = [name.strip() for name in families.split(",")] if families else []
    plan = Plan.make(chosen, budget_named(chosen, budget), wanted, settings or [])
    if dry_run:
        _list_runs(plan, as_json)
        return

    import sys

    from lbw_rl.training_runs.stress.report import build_stress_report, render_targets
    from lbw_rl.training_runs.stress.session import stress as run_suite
    from lbw_rl.training_runs.workers import check_backend

    findings = run_suite(
        plan,
        out_dir,
        meter,
        resume=resume,
        backend=check_backend(backend),
        workers=workers,
        command="lbw-rl " + " ".join(sys.argv[1:]),
    )
    path = build_stress_report(out_dir)
    if as_json:
        emit_json(findings)
        return
    out.print(render_targets(findings))
    out.print(f"report: {path}")


def _list_runs(plan: Plan, as_json: bool) -> None:
    from lbw_rl.training_runs.stress.listing import listing

    found = listing(plan)
    if as_json:
        emit_json(found)
        return
    for run in found["runs"]:
        changed = " ".join(f"{key}={value}" for key, value in run["settings"].items())
        place = f"{run['stage']:<7} {run['family']}  {run['arm']}  seed {run['seed']}"
        out.print(f"{place}  lr {run['lr']:.4g} {run['schedule']}  {run['steps']} steps  {changed}".rstrip())
    out.print(_total(found))


def _total(found: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {stage}" for stage, count in found["counts"].items() if count)
    text = f"{sum(found['counts'].values())} runs: {counts}"
    if found["rounds_may_follow"]:
        text += "; the search for AdamW's rate may add some, and the grid then stands around what it finds"
    return text
