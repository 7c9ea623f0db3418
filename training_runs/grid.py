"""What a grid is made of: arms, cells, and how cells are run, each once, in parallel, resumable."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lbw_rl.envs.recipe import ControllerSpec, Recipe, override
from lbw_rl.registry import load_controller
from lbw_rl.stages import Mode
from lbw_rl.training_runs.folders import remove_empty
from lbw_rl.training_runs.results import Row
from lbw_rl.training_runs.run import SUMMARY, run
from lbw_rl.training_runs.workers import Backend, executor, result_of


@dataclass(frozen=True)
class Arm:
    """One contender: a controller, and what it changes in the recipe.

    Attributes:
        label: what the table calls it.
        controller: name or frozen-policy folder; "constant" is the optimizer alone, observed.
        overrides: `key=value` recipe settings, for example `optimizer.grad_clip=1.0`.
    """

    label: str
    controller: str
    overrides: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Reads `[LABEL:=]CONTROLLER[@key=value…]`: `pid`, `AdamW + clip 1.0:=constant@optimizer.grad_clip=1.0`.

        Raises:
            ValueError: no such controller.
        """
        label, found, rest = text.partition(":=")
        controller, *overrides = (rest if found else text).split("@")
        load_controller(controller)  # a typo must not show after an hour of runs
        return cls(label if found else text, controller, tuple(overrides))

    def on(self, recipe: Recipe, settings: Iterable[str] = ()) -> Recipe:
        """`recipe` with this arm's overrides and controller, then `settings`.

        The recipe's controller options stay if the controller is the recipe's own.

        Raises:
            RecipeError: an override that the recipe does not take.
        """
        own = recipe.controller if self.controller == recipe.controller.name else ControllerSpec()
        name = f"controller.name={json.dumps(self.controller, ensure_ascii=False)}"
        return override(recipe.model_copy(update={"controller": own}), [*self.overrides, name, *settings])


@dataclass(frozen=True)
class Cell:
    """One run of a grid, in a folder relative to the grid's own, and how much governance may do in it."""

    arm: Arm
    recipe: Recipe
    folder: str
    mode: Mode = "govern"


def parse_arms(text: str) -> list[Arm]:
    """Reads comma-separated arms; a comma inside brackets belongs to its value, as in `optimizer.betas=[0.9,0.95]`.

    Raises:
        ValueError: no such controller.
    """
    return [Arm.parse(part.strip()) for part in re.split(r",(?![^\[]*\])", text)]


def parse_multiplier(text: str) -> float:
    """A learning-rate multiplier, written as a number or a fraction: `30`, `0.03`, `1/30`.

    Raises:
        ValueError: not a number > 0.
    """
    top, slash, bottom = text.partition("/")
    try:
        value = float(top) / (float(bottom) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        value = 0.0
    if not 0 < value < math.inf:
        raise ValueError(f"lr-multipliers: {text!r} is no multiplier; accepted: numbers > 0 such as 0.03, 1/30, 1, 30")
    return value


def slug(text: str) -> str:
    """The text as part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-").lower()


Submit = Callable[..., Future[Any]]
"""Hands a function and its arguments to a worker."""


@contextlib.contextmanager
def grid_workers(out: Path, backend: Backend, workers: int | None, most: int | None = None) -> Iterator[Submit]:
    """`executor`, for runs below `out`.

    Args:
        out: the grid's folder. Left by a ValueError, the block removes the folders of runs that are empty, so that
            the corrected command finds an empty one.
        backend: see `executor`.
        workers: local processes; default: one per core.
        most: no more than these.
    """
    try:
        with executor(backend, max(1, min(workers or os.cpu_count() or 1, most or sys.maxsize))) as submit:
            yield submit
    except ValueError:
        remove_empty(out / "runs")
        raise


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    submit: Submit,
    progress: Callable[[int, int, Row], None] | None = None,
) -> dict[str, Row]:
    """Runs the cells, in their order, and reads back those that an earlier attempt finished.

    Args:
        cells: cells that share a folder are one run.
        out: the grid's folder.
        submit: see `grid_workers`.
        progress: told (runs done, runs in all, row of the latest).

    Returns:
        The row of each cell's folder.

    Raises:
        ValueError: a run whose settings cannot be used.
    """
    unique = {cell.folder: cell for cell in cells}
    rows: dict[str, Row] = {}
    pending = {submit(_run_cell, cell, out): cell for cell in unique.values()}
    for future in as_completed(pending):
        cell = pending[future]
        rows[cell.folder] = row = Row(**result_of(future), arm=cell.arm.label, folder=cell.folder)
        if progress is not None:
            progress(len(rows), len(unique), row)
    return rows


def _run_cell(cell: Cell, out: Path) -> dict[str, Any]:
    """One run in a worker process; a finished one is read back, an unfinished one starts again."""
    summary = run(cell.recipe, out / cell.folder, resume=True, mode=cell.mode)
    return {k: v for k, v in summary.items() if k in Row.model_fields}


def record_of_machine(command: str) -> dict[str, Any]:
    """Command, date, machine and versions, for the record."""
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("lbw-rl", "torch", "transformers", "numpy")},
    }


def record_of_corpus(recipe: Recipe, run_folder: Path) -> dict[str, str]:
    """The name of the recipe's corpus, without the path of this machine, and its hash as the run found it."""
    summary = json.loads((run_folder / SUMMARY).read_text(encoding="utf-8"))
    corpus = recipe.data.corpus
    return {
        "corpus": corpus if "/" not in corpus else Path(corpus).name,
        "corpus_sha256": summary["corpus_sha256"],
    }
