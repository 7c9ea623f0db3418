"""Reading recipes: by name, from a TOML file, from a dict, with overrides.

Touches no model, corpus or tokenizer, so a bad recipe is refused before anything is loaded. Every refusal is
one line that names the field, its value and what is accepted.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lbw_rl.envs.specs import (
    ControllerSpec,
    DataSpec,
    ModelSpec,
    OptimizerSpec,
    Recipe,
    ScheduleSpec,
    TrainSpec,
)

__all__ = [
    "ControllerSpec",
    "DataSpec",
    "ModelSpec",
    "OptimizerSpec",
    "Recipe",
    "RecipeError",
    "ScheduleSpec",
    "TrainSpec",
    "known_recipes",
    "load_recipe",
    "override",
    "recipe_from_dict",
]


class RecipeError(ValueError):
    """A recipe that cannot be used. One line that names the field, its value and what is accepted."""


def _recipe_folder() -> Traversable:
    # Read as data: the recipes must not cost an import of the code that starts training.
    return files("lbw_rl") / "training_runs/recipes"


def known_recipes() -> list[str]:
    """Names of the recipes that ship with the package, sorted."""
    folder = _recipe_folder()
    if not folder.is_dir():
        return []
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(source: str | Path) -> Recipe:
    """Reads a recipe.

    Args:
        source: the name of a shipped recipe, or the path of a TOML file (anything that ends in `.toml` or
            holds a path separator).

    Raises:
        RecipeError: unknown name, missing or malformed file, or a field that validation refuses.
    """
    text = str(source)
    known = ", ".join(known_recipes())
    if isinstance(source, Path) or text.endswith(".toml") or "/" in text or "\\" in text:
        entry: Traversable = Path(source).expanduser()
        missing = f"recipe: {text!r} is no readable file; accepted: the path of a TOML file, or one of {known}"
    else:
        entry = _recipe_folder() / f"{text}.toml"
        close = difflib.get_close_matches(text, known_recipes(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        missing = f"recipe: unknown name {text!r}; {hint}known: {known}, or the path of a TOML file"
    if not entry.is_file():
        raise RecipeError(missing)
    try:
        values = tomllib.loads(entry.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"recipe: {text!r} is not a valid TOML file: {error}") from error
    return recipe_from_dict(values)


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """Validates a nested dict of a recipe's fields, for example what `Recipe.model_dump` gave.

    Raises:
        RecipeError: the first field that is refused, on one line.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_first_complaint(error)) from error


def override(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """A copy of `recipe` with fields replaced.

    Args:
        assignments: `section.field=value` each; the value is a TOML literal (`10`, `[0.9, 0.95]`, `true`) and
            anything else is taken as a string. `none` empties an optional field. Setting `model.path` puts
            `model.architecture` aside, and the other way round.

    Raises:
        RecipeError: not of that form, an unknown key, or a value that validation refuses.
    """
    values = recipe.model_dump()
    for assignment in assignments:
        key, equals, literal = assignment.partition("=")
        key = key.strip()
        if not equals or not key:
            raise RecipeError(
                f"override {assignment!r}: accepted form is section.field=value, for example train.steps=10"
            )
        parts = _accepted_key(key)
        target = values
        for part in parts[:-1]:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise RecipeError(f"{key}: {part} holds the single value {target!r} and has no fields")
        target[parts[-1]] = _literal(literal.strip())
        if key in ("model.path", "model.architecture") and target[parts[-1]] != "none":
            target["architecture" if key == "model.path" else "path"] = None
    return recipe_from_dict(values)


def _literal(text: str) -> object:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _accepted_key(key: str) -> list[str]:
    """The parts of a dotted key that names one settable field."""
    parts = key.split(".")
    node: Any = Recipe
    for depth, part in enumerate(parts):
        if node is dict:
            return parts  # controller options are the controller's own
        prefix = "".join(f"{p}." for p in parts[:depth])
        if not _is_spec(node):
            raise RecipeError(f"{key}: unknown key; {prefix[:-1]} is a single value and has no fields")
        if part not in node.model_fields:
            close = difflib.get_close_matches(part, node.model_fields, n=1)
            hint = f"did you mean {prefix}{close[0]}? " if close else ""
            raise RecipeError(f"{key}: unknown key; {hint}accepted: {', '.join(prefix + f for f in node.model_fields)}")
        node = node.model_fields[part].annotation
        node = dict if node == dict[str, Any] else node
    if _is_spec(node) or node is dict:
        fields = ", ".join(f"{key}.{f}" for f in node.model_fields) if _is_spec(node) else f"{key}.NAME"
        raise RecipeError(f"{key}: is a section; accepted: {fields}")
    return parts


def _is_spec(node: object) -> bool:
    return isinstance(node, type) and issubclass(node, BaseModel)


def _first_complaint(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    where = ".".join(location) or "recipe"
    node: Any = Recipe
    description = None
    for part in location:
        if not _is_spec(node) or part not in node.model_fields:
            break
        description = node.model_fields[part].description
        node = node.model_fields[part].annotation
    meaning = f" ({description})" if description else ""
    if first["type"] == "missing":
        return f"{where}: is missing and has no default{meaning}"
    if first["type"] == "extra_forbidden":
        prefix = "".join(f"{p}." for p in location[:-1])
        return f"{where}: unknown key; accepted: {', '.join(prefix + f for f in node.model_fields)}"
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    if first["type"] == "value_error":
        return f"{where}: {message}"
    return " ".join(f"{where}: {first['input']!r} is not accepted; {message}{meaning}".split())
