"""`lbw-rl evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbw_rl.cli.console import emit_json, meter, out

EPILOG = "Example: `lbw-rl evaluate my-policy-0 my-policy-1 --out evaluation`"


def evaluate(
    policies: Annotated[list[Path], typer.Argument(help="Folders of frozen policies: repetitions of one training.")],
    tiers: Annotated[
        str | None, typer.Option(help="Comma-separated tiers instead of all; an unknown name lists them.")
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Output folder; must be new or empty unless --resume.")] = Path(
        "evaluation"
    ),
    ablate: Annotated[
        bool,
        typer.Option(
            "--ablate",
            help="Also run the first policy blind to each group of signals, at other paces, and with readings of a device.",
        ),
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Local processes; default: one per core.", min=1)] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a killed command stopped; repeats no finished work.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Judge learned policies against every rule and tuned optimizers on tiers of proxies that none was trained on.

    Writes OUT/evaluation.json and OUT/report.html.
    """
    import os
    import sys

    from lbw_rl.training_runs.evaluation.report import build_evaluation_report, render_evaluation
    from lbw_rl.training_runs.evaluation.session import evaluate as judge
    from lbw_rl.training_runs.evaluation.tiers import tiers_named

    chosen = tiers_named([name.strip() for name in tiers.split(",")] if tiers else [])
    with meter("evaluating") as m:
        found = judge(
            policies,
            chosen,
            out_dir,
            ablate=ablate,
            resume=resume,
            workers=workers or os.cpu_count() or 1,
            meter=m,
            command="lbw-rl " + " ".join(sys.argv[1:]),
        )
    path = build_evaluation_report(out_dir)
    if as_json:
        emit_json(found)
    else:
        out.print(render_evaluation(found))
        out.print(f"report: {path}")
