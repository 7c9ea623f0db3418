"""The grid: every arm at every learning-rate multiplier and seed, paired, resumable, in parallel."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Literal, Protocol

import torch

from lbw_rl.envs.recipe import ControllerSpec, Recipe, override
from lbw_rl.registry import load_controller
from lbw_rl.training_runs.folders import prepare_output, read_jsonl, remove_empty, write_json
from lbw_rl.training_runs.results import Results, Row, write_results
from lbw_rl.training_runs.run import METRICS, SUMMARY, run
from lbw_rl.training_runs.summary import default_reference, summarise

Backend = Literal["local", "ray"]


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


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    arm: Arm
    recipe: Recipe
    folder: str


class Progress(Protocol):
    """Told after every finished run."""

    def __call__(self, done: int, total: int, row: Row) -> None:
        """`done` of `total` runs are finished, `row` the latest."""


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
        ValueError: arms or multipliers that are missing or not unique, seeds below 1, an output folder in use,
            or a run whose settings cannot be used.
    """
    if not arms or len({arm.label for arm in arms}) < len(arms):
        raise ValueError(
            f"controllers: {', '.join(a.label for a in arms) or 'none given'}; accepted: one or more, each once"
        )
    if seeds < 1:
        raise ValueError(f"seeds: {seeds} must be at least 1")
    cells = list(_grid(recipe, arms, multipliers, seeds))
    if not cells or len({cell.folder for cell in cells}) < len(cells):
        shown = ", ".join(f"{m:g}" for m in multipliers) or "none given"
        raise ValueError(f"lr-multipliers: {shown}; accepted: one or more, each once")
    for cell in cells[: len(arms)]:  # a bad option must not show after an hour of runs
        load_controller(cell.recipe.controller.name, **cell.recipe.controller.options)
    folder = prepare_output(out, resume).resolve()
    rows: dict[str, Row] = {}
    try:
        with _executor(backend, min(workers or os.cpu_count() or 1, len(cells))) as submit:
            pending = {submit(_run_cell, cell, folder): cell for cell in cells}
            for future in as_completed(pending):
                cell = pending[future]
                rows[cell.folder] = row = Row(**_result(future), arm=cell.arm.label, folder=cell.folder)
                if progress is not None:
                    progress(len(rows), len(cells), row)
    except ValueError:
        remove_empty(folder / "runs")  # so that the corrected command finds an empty folder
        raise
    ordered = _with_targets([rows[cell.folder] for cell in cells], folder)
    summary = summarise(ordered, default_reference(ordered))
    results = Results(rows=ordered, summary={**summary, "provenance": provenance(recipe, folder, cells, command)})
    write_results(folder, results)
    return results


def _grid(recipe: Recipe, arms: Sequence[Arm], multipliers: Sequence[float], seeds: int) -> Iterator[Cell]:
    for seed in range(recipe.train.seed, recipe.train.seed + seeds):
        for multiplier in multipliers:
            for arm in arms:
                own = recipe.controller if arm.controller == recipe.controller.name else ControllerSpec()
                settings = [
                    *arm.overrides,
                    f"controller.name={json.dumps(arm.controller, ensure_ascii=False)}",
                    f"train.lr_multiplier={float(multiplier)!r}",
                    f"train.seed={seed}",
                    "train.checkpoint_every=0",
                    "train.threads=1",
                ]
                slug = re.sub(r"[^\w.+-]+", "-", arm.label).strip("-").lower()
                unique = hashlib.sha256(arm.label.encode()).hexdigest()[:4]
                folder = f"runs/{slug}-{unique}/x{multiplier:.6g}/seed{seed}"
                yield Cell(arm, override(recipe.model_copy(update={"controller": own}), settings), folder)


def _run_cell(cell: Cell, out: Path) -> dict[str, Any]:
    """One run in a worker process; a finished one is read back, an unfinished one starts again."""
    summary = run(cell.recipe, out / cell.folder, resume=True)
    return {k: v for k, v in summary.items() if k in Row.model_fields}


def _result(future: Future[dict[str, Any]]) -> dict[str, Any]:
    try:
        return future.result()
    except Exception as e:
        cause = getattr(e, "cause", None)  # Ray wraps what a task raised, and its text is the whole traceback
        if isinstance(cause, Exception):
            raise cause from e
        raise


@contextlib.contextmanager
def _executor(backend: Backend, workers: int) -> Iterator[Callable[..., Future[Any]]]:
    if backend == "ray":
        with _ray_submit() as submit:
            yield submit
        return
    # spawn: a forked torch may hang on the thread pools of its parent
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with ours, theirs, ProcessPoolExecutor(workers, context, _start_worker, (theirs,)) as pool:
        try:
            yield pool.submit
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            ours.close()
            raise


def _start_worker(parent: Connection) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Connection) -> None:
    """Ends this worker once its parent has closed the pipe, or was killed.

    A worker that went on would write into the folders of the grid that resumes.
    """
    with contextlib.suppress(EOFError, OSError):
        parent.recv_bytes()
    os._exit(1)


@contextlib.contextmanager
def _ray_submit() -> Iterator[Callable[..., Future[Any]]]:
    try:
        import ray
    except ModuleNotFoundError as e:
        raise ValueError(
            "backend: 'ray' needs the package ray; accepted: pip install 'lbw-rl[ray]', or --backend local"
        ) from e
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)
    remote = ray.remote(num_cpus=1)(lambda f, *args: f(*args))
    try:
        yield lambda f, *args: remote.remote(f, *args).future()
    finally:
        if started:
            ray.shutdown()


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


def provenance(recipe: Recipe, folder: Path, cells: Sequence[Cell], command: str | None) -> dict[str, Any]:
    """What it takes to repeat the comparison: machine, versions, corpus, settings."""
    first = json.loads((folder / cells[0].folder / SUMMARY).read_text(encoding="utf-8"))
    record = {
        "command": command or " ".join(sys.argv[:1]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("lbw-rl", "torch", "transformers", "numpy")},
        "corpus": recipe.data.corpus if "/" not in recipe.data.corpus else Path(recipe.data.corpus).name,
        "corpus_sha256": first["corpus_sha256"],
        "recipe": recipe.model_dump(mode="json"),
    }
    write_json(folder / "provenance.json", record)
    return record
