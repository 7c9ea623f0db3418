"""One governed run of a recipe: train, evaluate, record, checkpoint, resume."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lbw_rl.controller import Controller
from lbw_rl.envs.recipe import Recipe
from lbw_rl.envs.task import TrainingTask
from lbw_rl.governor import Governor, Mode
from lbw_rl.last_good import HEALTHY_REGIMES
from lbw_rl.ledger import truncate_jsonl
from lbw_rl.registry import load_controller
from lbw_rl.sinks import Sink
from lbw_rl.stages import check_mode
from lbw_rl.training_runs.checkpoints import Checkpoints
from lbw_rl.training_runs.folders import (
    JsonLines,
    first_line,
    prepare_output,
    replace_folder,
    write_json,
)
from lbw_rl.training_runs.same_run import check_same_mode, check_same_recipe, refuse_former_checkpoint

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

    Args:
        recipe: what to train; `recipe.controller` governs.
        out: output folder.
        resume: continue from the folder's newest good checkpoint, or from the start where there is none; a
            finished run is returned as it is.
        mode: as in `Governor`.
        controller: an object to govern instead of the recipe's, for experiments.
        kill_signal: on this signal the governor lets go for good; the run goes on.
        sinks: as in `Governor`; open until the summary is written.
        progress: told about every step.

    Returns:
        The content of `summary.json`: the fields of a results row, and the governor's summary.

    Raises:
        ValueError: an output folder in use, a recipe or mode that differs from the folder's, a checkpoint of version
            0.1.0, or unusable settings.
        OSError: the disk takes neither the final model nor the summary; a resume goes on from the last checkpoint.
    """
    check_mode(mode)
    governing = controller or load_controller(recipe.controller.name, **recipe.controller.options)
    folder = prepare_output(out, resume)
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
        return summary
    refuse_former_checkpoint(folder)
    task = TrainingTask(recipe)
    record = _Record(mode)
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    found = checkpoints.newest()
    if found is None:
        record.initial_loss = task.evaluate()
        if not math.isfinite(record.initial_loss):
            raise ValueError(
                f"model: the held-out loss before training is {record.initial_loss}; accepted: weights and a "
                "model.dtype that give a finite one"
            )
        for name in (METRICS, LEDGER):
            (folder / name).unlink(missing_ok=True)  # of an attempt that died before its first checkpoint
        write_json(folder / RECIPE, recipe.model_dump(mode="json"))
    else:
        check_same_mode(folder, found[1]["record"], mode)
        task.load_state_dict(found[1]["task"])
        record = _Record(**found[1]["record"])
        kept = {
            METRICS: truncate_jsonl(folder / METRICS, task.step).total(),
            LEDGER: truncate_jsonl(folder / LEDGER, task.step, found[1]["ledger_header"])["decision"],
        }
    governor = Governor(
        task.optimizer,
        governing,
        authority=recipe.authority,
        total_steps=task.total_steps,
        mode=mode,
        ledger=folder / LEDGER,
        seed=recipe.train.seed,
        measure_device=recipe.train.measure_device,
        stateful={"scheduler": task.scheduler},
        control=folder / CONTROL,
        kill_signal=kill_signal,
        sinks=sinks,
    )
    if found is not None:
        governor.load_state_dict(found[1]["governor"])
        _tell_of_lost_lines(kept, {METRICS: task.step, LEDGER: governor.summary()["decisions"]}, task.step)
        del found  # as large as the model and its optimizer
    with governor:
        with JsonLines(folder / METRICS) as metrics:
            _train(task, governor, record, metrics, checkpoints, progress)
            metrics.sync()
            governor.flush()
        if recipe.train.checkpoint_every:
            _save_model(task, folder)
        summary = _summarise(task, governor, record, checkpoints.failures)
        write_json(folder / SUMMARY, summary)  # last: a folder with a summary is a finished run
    checkpoints.clear()
    return summary


def _train(
    task: TrainingTask,
    governor: Governor,
    record: _Record,
    metrics: JsonLines,
    checkpoints: Checkpoints,
    progress: Progress | None,
) -> None:
    train = task.recipe.train
    before = record.seconds
    start = time.perf_counter()
    paused = 0.0  # evaluation and bookkeeping do not count as training time
    put_off = False
    while task.step < task.total_steps:
        step = task.step
        loss, grad_norm = task.backward()
        governor.observe(loss, grad_norm=grad_norm, tokens=task.tokens_per_step)
        base_lr = float(task.optimizer.param_groups[0]["lr"])
        task.advance()
        stopped = time.perf_counter()
        record.train_loss = float(loss)
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
        metrics.write(line)
        scheduled = bool(train.checkpoint_every) and task.step % train.checkpoint_every == 0
        if (scheduled or put_off) and task.step < task.total_steps:
            reason = _unhealthy(task, governor, record.train_loss)
            if reason is None:
                # On disk before the checkpoint is: a power loss must not leave one that is ahead of them.
                metrics.sync()
                governor.flush()
                checkpoints.save(task.step, _state(task, governor, record, metrics.path.with_name(LEDGER)))
            elif not put_off:
                log.warning("the checkpoint of step %d is put off to the next healthy step: %s", task.step, reason)
            put_off = reason is not None
        if progress is not None:
            progress(task.step, task.total_steps, record.train_loss)
        paused += time.perf_counter() - stopped


# What the shipped controllers call a run in trouble. Names that only their controller understands do not count, or
# a run under it would never be checkpointed; "fault" and "suspended" speak of the governance, not of the run.
ALARMS = (
    frozenset(
        {"non-finite", "gradient-burst", "bad-batch", "diverged", "loss-spike", "overshoot", "safe-mode", "out-of-band"}
    )
    - HEALTHY_REGIMES
)


def _unhealthy(task: TrainingTask, governor: Governor, loss: float) -> str | None:
    """Why the present state must not be what a resume starts from, or None."""
    if not math.isfinite(loss):
        return f"the training loss is {loss}"
    sums = [p.detach().sum(dtype=torch.float32) for p in task.model.parameters()]
    if not torch.stack(sums).isfinite().all():
        return "a weight is not finite"
    regime = governor.last_ruling.action.regime
    return f"the controller sees {regime!r}" if governor.mode != "off" and regime in ALARMS else None


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
        "interventions": governance["interventions"],
        "steps_to_target": None,
        "checkpoint_failures": failures,
        "corpus_sha256": task.corpus_sha256,
        "governor": governance,
    }


def _state(task: TrainingTask, governor: Governor, record: _Record, ledger: Path) -> dict[str, Any]:
    return {
        "task": task.state_dict(),
        "governor": governor.state_dict(),
        "record": vars(record),
        "ledger_header": first_line(ledger),  # the one line that no later step could write again
    }


def _tell_of_lost_lines(kept: dict[str, int], written: dict[str, int], step: int) -> None:
    for name, count in written.items():
        if kept[name] < count:
            message = "%s holds %d of the %d lines written before step %d: the disk lost the rest, the run goes on"
            log.warning(message, name, kept[name], count, step)


def _save_model(task: TrainingTask, folder: Path) -> None:
    temporary = folder / (MODEL + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of an attempt that was killed while it wrote
    task.save_pretrained(temporary)
    replace_folder(temporary, folder / MODEL)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
