"""The grid: every arm at every learning-rate multiplier and seed, paired, resumable, in parallel."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from lbw_rl.envs.recipe import Recipe
from lbw_rl.registry import load_controller
from lbw_rl.training_runs.code_version import in_words, runs_by_code, tell_of_other_code
from lbw_rl.training_runs.folders import prepare_output, read_jsonl, write_json
from lbw_rl.training_runs.grid import (
    Arm,
    Cell,
    grid_workers,
    parse_arms,
    parse_multiplier,
    record_of_corpus,
    record_of_machine,
    run_cells,
    slug,
)
from lbw_rl.training_runs.results import Results, Row, write_results
from lbw_rl.training_runs.run import METRICS, SUMMARY
from lbw_rl.training_runs.summary import default_reference, summarise
from lbw_rl.training_runs.whole_record import lacking_lines, tell_of_lacking_lines
from lbw_rl.training_runs.workers import Backend

__all__ = ["Arm", "Backend", "Cell", "Progress", "compare", "parse_arms", "parse_multiplier", "provenance"]


_DECIDED = {
    "train.lr_multiplier": (None, "--lr-multipliers sets it"),
    "train.checkpoint_every": ("0", "a run of a grid keeps no checkpoints"),
    "train.threads": ("1", "a run has one thread, and --workers says how many runs go side by side"),
}
"""Setting → the value that every run of a grid has, and why."""


def refuse_what_grids_decide(settings: Sequence[str]) -> None:
    """Refuses `key=value` settings that the grid would write over.

    Raises:
        ValueError: there is one; says what decides it.
    """
    for setting in settings:
        key, _, value = (part.strip() for part in setting.partition("="))
        fixed, why = _DECIDED.get(key, (value, ""))
        if value != fixed:
            raise ValueError(
                f"set: {setting.strip()} has no effect in a comparison: {why}; accepted: any other setting"
            )


def refuse_for_all_arms(settings: Sequence[str]) -> None:
    """Refuses `key=value` settings that are to hold for all arms and cannot: besides the grid's own, a controller's.

    Raises:
        ValueError: there is one; says where it goes.
    """
    refuse_what_grids_decide(settings)
    for setting in settings:
        if setting.strip().startswith("controller."):
            raise ValueError(
                f"set: {setting.strip()} has no effect in a comparison: every arm brings its own controller; "
                "accepted: --controllers pid@controller.options.kp=0.2"
            )


class Progress(Protocol):
    """Told after every finished run."""

    def __call__(self, done: int, total: int, row: Row) -> None:
        """`done` of `total` runs are finished, `row` the latest."""


def compare(
    recipe: Recipe,
    arms: Sequence[Arm],
    multipliers: Sequence[float],
    seeds: int,
    out: str | Path,
    *,
    resume: bool = False,
    backend: Backend = "local",
    workers: int | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Results:
    """Runs the grid and writes `results.json` and `results.parquet`.

    Every arm sees the same initial weights and the same batches at each seed. Runs are ordered seed by seed, so
    that a grid cut short still holds complete pairs.

    Args:
        recipe: what to train.
        arms: the contenders; their labels must differ.
        multipliers: multiples of the recipe's learning rate.
        seeds: runs per arm and multiplier, numbered from the recipe's own seed.
        out: output folder; each run gets a folder of its own below `runs/`.
        resume: keep the finished runs of an earlier attempt.
        backend: "local" processes, or "ray" for a cluster that shares `out`.
        workers: local processes, one torch thread each; default: one per core.
        progress: told after every finished run.
        command: the command line, for the record.

    Raises:
        ValueError: arms or multipliers that are missing or not unique, an arm's setting that the grid decides, seeds below 1,
            an output folder in use, or a run whose settings cannot be used.
    """
    if not arms or len({arm.label for arm in arms}) < len(arms):
        raise ValueError(
            f"controllers: {', '.join(a.label for a in arms) or 'none given'}; accepted: one or more, each once"
        )
    if seeds < 1:
        raise ValueError(f"seeds: {seeds} must be at least 1")
    refuse_what_grids_decide([setting for arm in arms for setting in arm.overrides])
    cells = list(_grid(recipe, arms, multipliers, seeds))
    if not cells or len({cell.folder for cell in cells}) < len(cells):
        shown = ", ".join(f"{m:g}" for m in multipliers) or "none given"
        raise ValueError(f"lr-multipliers: {shown}; accepted: one or more, each once")
    for cell in cells[: len(arms)]:  # a bad option must not show after an hour of runs
        load_controller(cell.recipe.controller.name, **cell.recipe.controller.options)
    folder = prepare_output(out, resume).resolve()
    tell_of_other_code(folder, SUMMARY)
    with grid_workers(folder, backend, workers, len(cells)) as submit:
        rows = run_cells(cells, folder, submit, progress)
    ordered = _with_targets([rows[cell.folder] for cell in cells], folder)
    lacking = lacking_lines(folder, ordered)
    tell_of_lacking_lines(lacking)
    summary = {**summarise(ordered, default_reference(ordered)), "lacking": lacking}
    results = Results(rows=ordered, summary={**summary, "provenance": provenance(recipe, folder, ordered, command)})
    write_results(folder, results)
    return results


def _grid(recipe: Recipe, arms: Sequence[Arm], multipliers: Sequence[float], seeds: int) -> Iterator[Cell]:
    for seed in range(recipe.train.seed, recipe.train.seed + seeds):
        for multiplier in multipliers:
            for arm in arms:
                settings = [
                    f"train.lr_multiplier={float(multiplier)!r}",
                    f"train.seed={seed}",
                    *(f"{key}={value}" for key, (value, _) in _DECIDED.items() if value is not None),
                ]
                unique = hashlib.sha256(arm.label.encode()).hexdigest()[:4]
                folder = f"runs/{slug(arm.label)}-{unique}/x{multiplier:.6g}/seed{seed}"
                yield Cell(arm, arm.on(recipe, settings), folder)


def _with_targets(rows: list[Row], folder: Path) -> list[Row]:
    """Fills in `steps_to_target`: the first evaluation at or below what the reference arm, at its best multiplier, ends with."""
    reference = [r for r in rows if r.arm == default_reference(rows)]
    if not reference:
        return rows
    by_multiplier: dict[float, list[float]] = {}
    for r in reference:
        by_multiplier.setdefault(r.lr_multiplier, []).append(r.final_loss)
    target = min(median(losses) for losses in by_multiplier.values())
    return [r.model_copy(update={"steps_to_target": _first_step_at(folder / r.folder / METRICS, target)}) for r in rows]


def _first_step_at(metrics: Path, target: float) -> int | None:
    for record in read_jsonl(metrics):
        loss = record.get("eval_loss")
        if loss is not None and loss <= target:
            return int(record["step"]) + 1
    return None


def provenance(recipe: Recipe, folder: Path, rows: Sequence[Row], command: str | None) -> dict[str, Any]:
    """What it takes to repeat the comparison: machine, versions, corpus, settings."""
    record = {
        **record_of_machine(command or " ".join(sys.argv[:1])),
        "code": in_words(runs_by_code(rows)),
        **record_of_corpus(recipe, folder / rows[0].folder),
        "recipe": recipe.model_dump(mode="json"),
    }
    write_json(folder / "provenance.json", record)
    return record
