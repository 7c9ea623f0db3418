"""Models that this machine trains by a recipe once and keeps: `model.path = "recipe:NAME"`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import filelock
import torch

from lbw_rl.envs.extras import hf_package
from lbw_rl.envs.recipe import DataSpec, Recipe, RecipeError, load_recipe
from lbw_rl.envs.text import file_stamp, load_text
from lbw_rl.envs.token_cache import cache_folder
from lbw_rl.files import sync_files, sync_folder

log = logging.getLogger("lbw_rl")

PREFIX = "recipe:"

_TIMED = 12  # steps after which the rest of a training can be foretold; the first one is slower than all others


def recipe_of(path: str) -> Recipe | None:
    """The recipe that a `model.path` of the form 'recipe:NAME' names; None for a folder or a hub id.

    NAME is what `load_recipe` takes: a shipped recipe, or the path of a TOML file. Nothing is trained or loaded.

    Raises:
        RecipeError: no such recipe, or one whose own model comes, over whatever others, from itself.
    """
    chain: list[str] = []
    found: Recipe | None = None
    while path.startswith(PREFIX):
        if path in chain:
            raise RecipeError(
                f"model.path: {chain[0]!r} leads back to itself ({' → '.join([*chain, path])}); accepted: a recipe "
                "whose model is fresh, or of a folder or hub id, at the end"
            )
        chain.append(path)
        try:
            recipe = load_recipe(path.removeprefix(PREFIX))
        except RecipeError as error:
            raise RecipeError(f"model.path: {path!r} names no usable recipe; {error}") from error
        found = found or recipe
        path = recipe.model.path or ""
    return found


def model_folder(path: str) -> str:
    """Where the model is that a `model.path` names: any folder or hub id as it is, 'recipe:NAME' trained and kept.

    The recipe is run without governance, by this process, if no process has done so before with the same recipe, text
    and versions of torch and transformers; a second process that wants the same model waits. It is kept under
    `token_cache.cache_folder()`, in `models/`, in the form that `save_pretrained` writes. The content of a local folder
    that the recipe starts from is taken for unchanging.

    Raises:
        RecipeError: see `recipe_of`.
        ValueError: the cache cannot be written, or the training diverged.
        CorpusError, ModelError, ModuleNotFoundError: see `TrainingTask`.
    """
    recipe = recipe_of(path)
    if recipe is None:
        return path
    folder = cache_folder() / "models" / _file_name(recipe)
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _alone(folder):
                if not folder.is_dir():  # another process may have made it meanwhile
                    _pretrain(recipe, folder)
        except OSError as error:
            raise ValueError(
                f"model.path: {path!r} cannot be kept in {folder} ({error.strerror or error}); accepted: a cache folder "
                "that can be written, $LBW_RL_CACHE"
            ) from error
    return str(folder)


def _file_name(recipe: Recipe) -> str:
    """Of the folder: the recipe's name and a digest of all that its model depends on."""
    fields = recipe.model_dump(mode="json")
    if (base := recipe_of(recipe.model.path or "")) is not None:
        fields["model"]["path"] = _file_name(base)
    transformers = hf_package("transformers", "a model trained by a recipe")
    identity = [
        fields,
        _corpus_digest(recipe.data, file_stamp(recipe.data)),
        torch.__version__,
        transformers.__version__,
    ]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9._-]', '-', recipe.name)}-{digest[:16]}"


@lru_cache(maxsize=8)
def _corpus_digest(data: DataSpec, stamp: tuple[int, int] | None) -> str:
    return load_text(data).sha256


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system takes back from a process that dies."""
    lock = filelock.FileLock(folder.with_name(folder.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.warning("waiting for another process that is training %s", folder.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _pretrain(recipe: Recipe, folder: Path) -> None:
    """Trains the recipe as it is, nobody governing, and gives its folder its name at the very end."""
    from lbw_rl.envs.task import TrainingTask  # which resolves its model here

    threads = torch.get_num_threads()
    try:
        task = TrainingTask(recipe)
        initial = task.evaluate()
        start = timed = time.perf_counter()
        while task.step < task.total_steps:
            if task.step == 1:
                timed = time.perf_counter()
            task.backward()
            task.advance()
            if task.step == min(_TIMED, task.total_steps):
                seconds = (time.perf_counter() - timed) * task.total_steps / task.step
                message = "pretraining %s once: %d steps, about %.1f minutes; kept in %s"
                log.warning(message, recipe.name, task.total_steps, seconds / 60, folder)
        final, seconds = task.evaluate(), time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    if not (math.isfinite(final) and final < initial):
        raise RecipeError(
            f"model.path: the training of {recipe.name!r} diverged (held-out loss {initial:.3f}, then {final:.3f}); "
            "accepted: a recipe that learns"
        )
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed while it wrote
    task.save_pretrained(temporary)
    origin = {
        "recipe": recipe.model_dump(mode="json"),
        "corpus_sha256": task.corpus_sha256,
        "torch": torch.__version__,
        "held_out_loss": final,
        "seconds": round(seconds, 1),
    }
    (temporary / "training.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    sync_files(temporary)
    os.replace(temporary, folder)
    sync_folder(folder.parent)
    log.warning("%s: held-out loss %.3f nats after %.0f s", recipe.name, final, seconds)
