"""`lbw-rl policy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbw_rl.cli.console import emit_json, out

policy_app = typer.Typer(help="Look at a frozen policy.", no_args_is_help=True)


@policy_app.command(epilog="Example: `lbw-rl policy inspect my-policy`")
def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of a frozen policy.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """What a frozen policy is: features, authority, fallback, where it comes from."""
    from rich.table import Table

    from lbw_rl.policy import load_policy

    policy = load_policy(folder)
    header = policy.header
    if as_json:
        emit_json(header.model_dump())
        return
    parameters = sum(w.size + b.size for w, b in policy.layers)
    out.print(
        f"{folder}: {parameters:,} parameters, hidden {header.hidden_sizes}, decides every {header.decide_every} steps"
    )
    out.print(f"authority: lr_scale {header.authority.lr_scale}, momentum_scale {header.authority.momentum_scale}")
    held = f", held through each of {header.stretches} parts of a run" if header.stretches else ""
    out.print(f"actions: relative to {header.relative_to}{held}")
    out.print(
        f"fallback: {header.fallback.controller} past {header.fallback.rate:.0%} unfamiliar decisions of {header.fallback.window}"
        + (", and in runs of low-rank adapters" if header.fallback.adapters else "")
    )
    table = Table("feature", "definition", "mean", "std", title=f"features, schema {header.feature_schema}")
    for (name, definition), mean, std in zip(header.features.items(), header.mean, header.std):
        table.add_row(name, definition, f"{mean:.3f}", f"{std:.3f}")
    out.print(table)
    for key, value in header.provenance.items():
        out.print(f"{key}: {value}")


@policy_app.command(epilog="Example: `lbw-rl policy verify my-policy`")
def verify(folder: Annotated[Path, typer.Argument(help="Folder of a frozen policy.")]) -> None:
    """Check that a frozen policy is intact: schema, features, normaliser, shapes, hash. Exit 2 with a reason if not."""
    from lbw_rl.policy import load_policy

    header = load_policy(folder).header
    out.print(
        f"intact: {folder} (weights sha256 {header.weights_sha256[:16]}…, feature schema {header.feature_schema})"
    )
