"""One governed run of a recipe: train, evaluate, record, checkpoint, resume."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lbw_rl.controller import Controller
from lbw_rl.envs.ranks import Ranks, joined
from lbw_rl.envs.recipe import Recipe
from lbw_rl.envs.task import TrainingTask
from lbw_rl.governor import Governor, Mode
from lbw_rl.ledger import truncate_jsonl
from lbw_rl.registry import load_controller
from lbw_rl.sinks import Sink
from lbw_rl.stages import check_mode
from lbw_rl.training_runs.checkpoints import Checkpoints
from lbw_rl.training_runs.code_version import UNRECORDED, code_version
from lbw_rl.training_runs.folders import (
    JsonLines,
    first_line,
    prepare_output,
    replace_folder,
    write_json,
)
from lbw_rl.training_runs.health import unhealthy
from lbw_rl.training_runs.run_state import give_back, governor_state, newest_state, run_state
from lbw_rl.training_runs.same_run import (
    check_same_inputs,
    check_same_mode,
    check_same_recipe,
    fingerprint_of,
    refuse_former_checkpoint,
)

log = logging.getLogger("lbw_rl")

SUMMARY, METRICS, LEDGER, CHECKPOINTS, RECIPE, MODEL, CONTROL = (
    "summary.json",
    "metrics.jsonl",
    "ledger.jsonl",
    "checkpoints",
    "recipe.json",
    "model",
    "control",
)

Progress = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, latest training loss or NaN)."""


@dataclass
class _Record:
    """What a run knows about itself besides weights and governance."""

    mode: str  # that it was started with: the governor's may have been changed since
    initial_loss: float = math.nan
    seconds: float = 0.0
    train_loss: float = math.nan
    tail: list[float] = field(default_factory=list)
    code: str = field(default_factory=code_version)  # of all that had a part in it


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    mode: Mode = "govern",
    controller: Controller | None = None,
    kill_signal: int | None = None,
    sinks: Sequence[Sink] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains a recipe under its controller.

    One word in the file `control` of the output folder, a mode, changes the mode while the run goes on.

    Writes `recipe.json`, `metrics.jsonl` (training loss each step, held-out loss every `train.eval_every`),
    `ledger.jsonl`, `checkpoints/` every `train.checkpoint_every` steps (the newest two stay until the run is
    finished), with them `model/` at the end, and `summary.json` last. Killed at any moment and resumed, a run ends
    with the weights and the decisions of the uninterrupted one, bit for bit (CPU, same number of threads), unless
    its controller looks at clock or device.

    A checkpoint is put off to the next healthy step while the loss or a weight is not finite or the controller sees
    an alarm: what a resume starts from is good. A full disk costs checkpoints, not the run.

    Started by torchrun, or where a process group exists, all its ranks train the recipe together, see `TrainingTask`: the
    first of them writes the files, and a run resumes on any number of ranks (bit for bit on the same number of one or two;
    beyond, sums over ranks are taken in whatever order the backend likes). What one rank cannot use, all refuse.

    Args:
        recipe: what to train; `recipe.controller` governs.
        out: output folder.
        resume: continue from the folder's newest good checkpoint, or from the start where there is none; a
            finished run is returned as it is.
        mode: as in `Governor`.
        controller: an object to govern instead of the recipe's, for experiments.
        kill_signal: on this signal the governor lets go for good; the run goes on.
        sinks: as in `Governor`; open until the summary is written.
        progress: told about every step, on every rank that has one.

    Returns:
        The content of `summary.json`: the fields of a results row, and the governor's summary.

    Raises:
        ValueError: an output folder in use, a recipe or mode that differs from the folder's, a checkpoint of version
            0.1.0, or unusable settings.
        OSError: the disk takes neither the final model nor the summary; a resume goes on from the last checkpoint.
        PeerLostError: another rank is gone; a resume goes on from the last checkpoint.
    """
    check_mode(mode)
    if kill_signal is not None and signal.getsignal(kill_signal) == signal.SIG_DFL:
        with contextlib.suppress(ValueError):  # not in the main thread
            # Its default action ends the process: not while nothing governs yet, nor in mode "off".
            signal.signal(kill_signal, signal.SIG_IGN)
    governing = controller or load_controller(recipe.controller.name, **recipe.controller.options)
    with joined(recipe.train.device) as ranks:
        finished = ranks.first(lambda: _enter(Path(out), resume, recipe, mode, governing))
        if finished is not None:
            return finished
        return _run(recipe, Path(out), ranks, governing, mode, kill_signal, sinks, progress)


def _enter(folder: Path, resume: bool, recipe: Recipe, mode: Mode, governing: Controller) -> dict[str, Any] | None:
    """Makes the folder of a run or accepts it; the summary, where the run is finished already."""
    prepare_output(folder, resume)
    check_same_recipe(folder / RECIPE, recipe)
    if (folder / SUMMARY).exists():
        try:
            summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
            finished_in = {"mode": summary["mode"]}
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(
                f"resume: {folder / SUMMARY} is damaged ({e}); accepted: a run's own, or a new --out"
            ) from e
        check_same_mode(folder, finished_in, mode)
        check_same_inputs(folder, summary, recipe.data, governing)
        return summary
    refuse_former_checkpoint(folder)
    return None


def _run(
    recipe: Recipe,
    folder: Path,
    ranks: Ranks,
    governing: Controller,
    mode: Mode,
    kill_signal: int | None,
    sinks: Sequence[Sink],
    progress: Progress | None,
) -> dict[str, Any]:
    task = TrainingTask(recipe, ranks)
    record = _Record(mode)
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    found = newest_state(checkpoints, ranks)
    if found is None:
        record.initial_loss = task.evaluate()
        if not math.isfinite(record.initial_loss):
            raise ValueError(
                f"model: the held-out loss before training is {record.initial_loss}; accepted: weights and a "
                "model.dtype that give a finite one"
            )
        ranks.first(lambda: _begin_files(folder, recipe))
    else:
        check_same_mode(folder, found["record"], mode)
        give_back(found, task)
        record = _Record(**{"code": UNRECORDED, **found["record"]})
        if code_version() not in record.code:
            if ranks.leads:
                log.warning("the run in %s was begun by another version of the code, %s", folder, record.code)
            record.code += f", then {code_version()}"
        header, step = found["ledger_header"], task.step
        kept = ranks.first(lambda: _cut_files(folder, step, header))
    governor = Governor(
        task.optimizer,
        governing,
        authority=recipe.authority,
        total_steps=task.total_steps,
        mode=mode,
        ledger=folder / LEDGER if ranks.leads else None,
        seed=recipe.train.seed,
        measure_device=recipe.train.measure_device,
        device_index=task.device.index,
        stateful={"scheduler": task.scheduler},
        control=folder / CONTROL if ranks.leads else None,
        kill_signal=kill_signal,
        sinks=sinks,
    )
    if found is not None:
        governor.load_state_dict(governor_state(found, task))
        if ranks.leads:
            _tell_of_lost_lines(kept, {METRICS: task.step, LEDGER: governor.summary()["decisions"]}, task.step)
        del found  # as large as the model and its optimizer
    with governor:
        with JsonLines(folder / METRICS) if ranks.leads else contextlib.nullcontext() as metrics:
            _train(task, governor, record, metrics, checkpoints, progress)
            if metrics is not None:
                metrics.sync()
            governor.flush()
        if recipe.train.checkpoint_every:
            _save_model(task, folder)
        summary = _summarise(task, governor, record, checkpoints.failures)
        ranks.first(lambda: write_json(folder / SUMMARY, summary))  # last: a folder with a summary is a finished run
    if ranks.leads:
        checkpoints.clear()
    return ranks.first(lambda: summary)


def _begin_files(folder: Path, recipe: Recipe) -> None:
    for name in (METRICS, LEDGER):
        (folder / name).unlink(missing_ok=True)  # of an attempt that died before its first checkpoint
    write_json(folder / RECIPE, recipe.model_dump(mode="json"))


def _cut_files(folder: Path, step: int, header: str | None) -> dict[str, int]:
    """Takes off what the resumed run will write again; how many lines are left of each."""
    return {
        METRICS: truncate_jsonl(folder / METRICS, step).total(),
        LEDGER: truncate_jsonl(folder / LEDGER, step, header)["decision"],
    }


def _train(
    task: TrainingTask,
    governor: Governor,
    record: _Record,
    metrics: JsonLines | None,
    checkpoints: Checkpoints,
    progress: Progress | None,
) -> None:
    train, ranks = task.recipe.train, task.ranks
    before = record.seconds
    start = time.perf_counter()
    paused = 0.0  # evaluation and bookkeeping do not count as training time
    put_off = False
    while task.step < task.total_steps:
        step = task.step
        loss, grad_norm = task.backward()
        governor.observe(loss, grad_norm=grad_norm, tokens=task.tokens_per_step // ranks.world)
        base_lr = float(task.optimizer.param_groups[0]["lr"])
        task.advance()
        record.train_loss = float(ranks.mean(loss))
        stopped = time.perf_counter()
        record.tail = [*record.tail[-19:], record.train_loss]
        due = bool(train.eval_every) and task.step % train.eval_every == 0
        record.seconds = before + stopped - start - paused
        line = {
            "step": step,
            "loss": _finite(record.train_loss),
            "eval_loss": _finite(task.evaluate()) if due or task.step == task.total_steps else None,
            "lr": base_lr * governor.executed.lr_scale,
            "seconds": round(record.seconds, 6),
        }
        if metrics is not None:
            metrics.write(line)
        scheduled = bool(train.checkpoint_every) and task.step % train.checkpoint_every == 0
        if (scheduled or put_off) and task.step < task.total_steps:
            reason = unhealthy(task, governor, record.train_loss)
            if reason is None:
                _checkpoint(task, governor, record, metrics, checkpoints)
            elif ranks.leads and not put_off:
                log.warning("the checkpoint of step %d is put off to the next healthy step: %s", task.step, reason)
            put_off = reason is not None
        if progress is not None:
            progress(task.step, task.total_steps, record.train_loss)
        paused += time.perf_counter() - stopped


def _checkpoint(
    task: TrainingTask, governor: Governor, record: _Record, metrics: JsonLines | None, checkpoints: Checkpoints
) -> None:
    # On disk before the checkpoint is: a power loss must not leave one that is ahead of them.
    if metrics is not None:
        metrics.sync()
    governor.flush()
    header = first_line(metrics.path.with_name(LEDGER)) if metrics is not None else None
    state = run_state(task, governor, vars(record), header)
    # The others wait: their next collective would time out on a slow disk.
    task.ranks.first(lambda: checkpoints.save(task.step, state))


def _summarise(task: TrainingTask, governor: Governor, record: _Record, failures: int) -> dict[str, Any]:
    recipe = task.recipe
    final = task.evaluate()
    # A model that reads text no better than before training is as lost as one full of NaN.
    diverged = not (math.isfinite(final) and final < record.initial_loss)
    capped = record.initial_loss if diverged else final
    governance = governor.summary()
    clip, adaptive = recipe.optimizer.grad_clip, recipe.optimizer.adaptive_clip
    return {
        "recipe": recipe.name,
        "optimizer": recipe.optimizer.name + (f"+clip{clip:g}" if clip else "") + (f"+{adaptive}" if adaptive else ""),
        "controller": recipe.controller.name,
        "mode": record.mode,
        "lr_multiplier": recipe.train.lr_multiplier,
        "base_lr": recipe.optimizer.lr,
        "seed": recipe.train.seed,
        "final_loss": capped,
        "final_ppl": math.exp(min(capped, 700.0)),
        "final_loss_uncapped": _finite(final),
        "final_train_loss": _finite(sum(record.tail) / max(1, len(record.tail))),
        "initial_loss": record.initial_loss,
        "diverged": diverged,
        "steps": task.step,
        "seconds": record.seconds,
        "overhead_seconds": governance["overhead_seconds"],
        "skips": governance["skips"],
        "rollbacks": governance["rollbacks"],
        "decisions": governance["decisions"],
        "interventions": governance["interventions"],
        "steps_to_target": None,
        "checkpoint_failures": failures,
        "code": record.code,
        "corpus_sha256": task.corpus_sha256,
        "policy": fingerprint_of(governor.controller),
        "governor": governance,
    }


def _tell_of_lost_lines(kept: dict[str, int], written: dict[str, int], step: int) -> None:
    for name, count in written.items():
        if kept[name] < count:
            message = "%s holds %d of the %d lines written before step %d: the disk lost the rest, the run goes on"
            log.warning(message, name, kept[name], count, step)


def _save_model(task: TrainingTask, folder: Path) -> None:
    temporary = folder / (MODEL + ".tmp")
    if task.ranks.leads:
        shutil.rmtree(temporary, ignore_errors=True)  # of an attempt that was killed while it wrote
    try:
        task.ranks.together(lambda: task.save_pretrained(temporary))
        task.ranks.first(lambda: replace_folder(temporary, folder / MODEL))
    except OSError:
        if task.ranks.leads:  # half a model helps nobody, and its room may
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
