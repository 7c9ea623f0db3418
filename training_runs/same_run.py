"""Whether the run in a folder is the one that is asked for: nothing is resumed under other settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lbw_rl.controller import Controller
from lbw_rl.controllers.ppo import FrozenPolicy
from lbw_rl.envs.recipe import Recipe, recipe_from_dict
from lbw_rl.envs.specs import DataSpec
from lbw_rl.envs.text import file_stamp, load_text


def check_same_recipe(path: Path, recipe: Recipe) -> None:
    """Accepts a folder without a run, and one whose run is of the same recipe.

    Args:
        path: the recipe's file in the run's folder; a setting that it does not know yet had its default.
        recipe: what is to be trained.

    Raises:
        ValueError: the folder holds something else, or a run of another recipe.
    """
    folder = path.parent
    if not path.exists():
        if any(not entry.name.endswith(".tmp") for entry in folder.iterdir()):
            raise ValueError(f"out: {folder} holds files but no run to resume; accepted: a run's folder, or a new one")
        return
    try:
        saved = recipe_from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as e:
        raise ValueError(f"resume: {path} is no recipe ({e}); accepted: the folder of a run, or a new --out") from e
    before, now = flat_recipe(saved), flat_recipe(recipe)
    changed = sorted(key for key in {*before, *now} if now.get(key) != before.get(key))
    if changed:
        raise ValueError(
            f"resume: {folder} was started with another recipe (differs in {', '.join(changed)}); "
            "accepted: the same recipe and settings, or a new --out"
        )


def check_same_mode(folder: Path, saved: dict[str, Any], mode: str) -> None:
    """Compares the mode of a summary or a checkpoint.

    Raises:
        ValueError: the run in the folder has another one.
    """
    if saved["mode"] != mode:
        raise ValueError(f"mode: {folder} was started with {saved['mode']!r}; accepted: the same mode, or a new --out")


def fingerprint_of(controller: Controller) -> str | None:
    """Which frozen policy governs; None for a rule."""
    return controller.policy.fingerprint if isinstance(controller, FrozenPolicy) else None


def check_same_inputs(folder: Path, summary: dict[str, Any], data: DataSpec, controller: Controller) -> None:
    """Compares what a recipe only names, a text and a policy, with what a finished run found under those names.

    Raises:
        ValueError: the file of the text, or the folder of the policy, holds something else by now.
    """
    accepted = "accepted: what it held then, or a new --out"
    if "policy" in summary and summary["policy"] != fingerprint_of(controller):
        raise ValueError(f"resume: {folder} was governed by another policy of that name; {accepted}")
    if file_stamp(data) is not None and load_text(data).sha256 != summary.get("corpus_sha256"):
        raise ValueError(f"resume: {folder} was trained on another text than {data.corpus} holds now; {accepted}")


def refuse_former_checkpoint(folder: Path) -> None:
    """Version 0.1.0 kept one `checkpoint.pt`, whose state nothing here can continue.

    Raises:
        ValueError: the folder holds one.
    """
    former = folder / "checkpoint.pt"
    if former.exists():
        raise ValueError(
            f"resume: {former} is of lbw-rl 0.1.0, which this version does not read; "
            "accepted: finishing that run with 0.1.0, or a new --out"
        )


def flat_recipe(recipe: Recipe) -> dict[str, Any]:
    """Dotted key → value, as JSON data."""
    return _flat(recipe.model_dump(mode="json"))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
