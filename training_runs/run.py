"""One governed run of a recipe: train, evaluate, record, checkpoint, resume."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from lbw_rl.controller import Controller
from lbw_rl.envs.recipe import Recipe
from lbw_rl.envs.task import TrainingTask
from lbw_rl.governor import Governor, Mode
from lbw_rl.registry import load_controller
from lbw_rl.training_runs.folders import prepare_output, truncate_jsonl, write_json

SUMMARY, METRICS, LEDGER, CHECKPOINT, RECIPE = (
    "summary.json",
    "metrics.jsonl",
    "ledger.jsonl",
    "checkpoint.pt",
    "recipe.json",
)

Progress = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, latest training loss or NaN)."""


@dataclass
class _Record:
    """What a run knows about itself besides weights and governance."""

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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains a recipe under its controller.

    Writes `recipe.json`, `metrics.jsonl` (training loss each step, held-out loss every `train.eval_every`),
    `ledger.jsonl`, `checkpoint.pt` every `train.checkpoint_every` steps, and `summary.json` at the end.

    Args:
        recipe: what to train; `recipe.controller` governs.
        out: output folder.
        resume: continue from the folder's checkpoint, or from the start where there is none yet; a finished run
            is returned as it is.
        mode: as in `Governor`.
        controller: an object to govern instead of the recipe's, for experiments.
        progress: told about every step.

    Returns:
        The content of `summary.json`: the fields of a results row, and the governor's summary.

    Raises:
        ValueError: an output folder in use, a recipe or mode that differs from the folder's, or unusable settings.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode: {mode!r} is unknown; accepted: {', '.join(get_args(Mode))}")
    governing = controller or load_controller(recipe.controller.name, **recipe.controller.options)
    folder = prepare_output(out, resume)
    _check_same_recipe(folder, recipe)
    if (folder / SUMMARY).exists():
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        _check_same_mode(folder, summary, mode)
        return summary
    task = TrainingTask(recipe)
    record = _Record()
    checkpoint = torch.load(folder / CHECKPOINT, weights_only=True) if (folder / CHECKPOINT).exists() else None
    if checkpoint is None:
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
        _check_same_mode(folder, checkpoint, mode)
        task.load_state_dict(checkpoint["task"])
        record = _Record(**checkpoint["record"])
        for name in (METRICS, LEDGER):
            truncate_jsonl(folder / name, task.step)
    governor = Governor(
        task.optimizer,
        governing,
        authority=recipe.authority,
        total_steps=task.total_steps,
        mode=mode,
        ledger=folder / LEDGER,
        seed=recipe.train.seed,
    )
    if checkpoint is not None:
        governor.load_state_dict(checkpoint["governor"])
    with governor, (folder / METRICS).open("a", buffering=1, encoding="utf-8") as metrics:
        _train(task, governor, record, folder, metrics.write, progress)
    if recipe.train.checkpoint_every:
        task.save_pretrained(folder / "model")
    summary = _summarise(task, governor, record)
    write_json(folder / SUMMARY, summary)  # last: a folder with a summary is a finished run
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return summary


def _train(
    task: TrainingTask,
    governor: Governor,
    record: _Record,
    folder: Path,
    write: Callable[[str], object],
    progress: Progress | None,
) -> None:
    train = task.recipe.train
    before = record.seconds
    start = time.perf_counter()
    paused = 0.0  # evaluation and bookkeeping do not count as training time
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
        write(json.dumps(line, separators=(",", ":")) + "\n")
        if train.checkpoint_every and task.step % train.checkpoint_every == 0 and task.step < task.total_steps:
            _save_checkpoint(folder, task, governor, record)
        if progress is not None:
            progress(task.step, task.total_steps, record.train_loss)
        paused += time.perf_counter() - stopped


def _summarise(task: TrainingTask, governor: Governor, record: _Record) -> dict[str, Any]:
    recipe = task.recipe
    final = task.evaluate()
    # A model that reads text no better than before training is as lost as one full of NaN.
    diverged = not (math.isfinite(final) and final < record.initial_loss)
    capped = record.initial_loss if diverged else final
    governance = governor.summary()
    clip = recipe.optimizer.grad_clip
    return {
        "recipe": recipe.name,
        "optimizer": recipe.optimizer.name + (f"+clip{clip:g}" if clip else ""),
        "controller": recipe.controller.name,
        "mode": governor.mode,
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
        "corpus_sha256": task.corpus_sha256,
        "governor": governance,
    }


def _save_checkpoint(folder: Path, task: TrainingTask, governor: Governor, record: _Record) -> None:
    state = {
        "task": task.state_dict(),
        "governor": governor.state_dict(),
        "record": vars(record),
        "mode": governor.mode,
    }
    temporary = folder / (CHECKPOINT + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, folder / CHECKPOINT)


def _check_same_recipe(folder: Path, recipe: Recipe) -> None:
    path = folder / RECIPE
    if not path.exists():
        if any(not entry.name.endswith(".tmp") for entry in folder.iterdir()):
            raise ValueError(f"out: {folder} holds files but no run to resume; accepted: a run's folder, or a new one")
        return
    before = _flat(json.loads(path.read_text(encoding="utf-8")))
    now = _flat(recipe.model_dump(mode="json"))
    changed = sorted(key for key in {*before, *now} if now.get(key) != before.get(key))
    if changed:
        raise ValueError(
            f"resume: {folder} was started with another recipe (differs in {', '.join(changed)}); "
            "accepted: the same recipe and settings, or a new --out"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _check_same_mode(folder: Path, saved: dict[str, Any], mode: Mode) -> None:
    if saved["mode"] != mode:
        raise ValueError(f"mode: {folder} was started with {saved['mode']!r}; accepted: the same mode, or a new --out")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
