"""How `lbw-rl run --dry-run` answers."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from lbw_rl.cli.console import emit_json, out

if TYPE_CHECKING:
    from lbw_rl.envs.recipe import Recipe


def print_estimate(recipe: Recipe, devices: int | None, tflops: float | None, as_json: bool) -> None:
    """Prints what a run will need, as lines of text or as JSON."""
    from lbw_rl.training_runs.estimate import estimate, in_words

    found = estimate(recipe, 1 if devices is None else devices, tflops)
    if as_json:
        emit_json({**asdict(found), "memory_total": found.memory_total})
        return
    for line in in_words(found):
        out.print(line)
