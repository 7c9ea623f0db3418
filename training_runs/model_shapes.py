"""The shape of a recipe's model before it is loaded: from its folder, the hub, or what is publicly known of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lbw_rl.envs import adapters
from lbw_rl.envs.extras import hf_package
from lbw_rl.envs.model import ModelError, check_fit, fresh_config, looks_like_a_folder
from lbw_rl.envs.recipe import Recipe
from lbw_rl.envs.recipe_models import recipe_of

_QWEN25 = {"model_type": "qwen2", "rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}

KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-3B": _QWEN25
    | {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-7B": _QWEN25
    | {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-14B": _QWEN25
    | {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
        "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": {
        "model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Hub id → its published config.json, as far as it decides sizes: a dry run of the shipped recipes needs no network."""


def model_config(recipe: Recipe) -> tuple[Any, str]:
    """transformers' configuration of the model that a recipe trains, and in words where it was found.

    A local folder's own; else, of a hub id, what this machine has downloaded before, what `KNOWN` says, what the hub
    answers, in this order: without a network the hub takes half a minute to say so. 'recipe:NAME' has the shape that
    its recipe gives it; nothing is trained.

    Raises:
        ModelError: no configuration, or a model whose vocabulary or context is too small for the recipe.
        RecipeError: see `recipe_of`.
        ModuleNotFoundError: without the extra `lbw-rl[hf]`.
    """
    path, data = recipe.model.path, recipe.data
    if path is None:
        return fresh_config(recipe.model, data.vocab_size, max(2048, data.sequence_length)), "recipe"
    base = recipe_of(path)
    if base is not None:
        config, source = model_config(base)[0], f"recipe {base.name}"
    else:
        config, source = _found(path)
    check_fit(config, path, data.vocab_size if data.tokenizer == "bpe" else 0, data.sequence_length)
    return config, source


def _found(path: str) -> tuple[Any, str]:
    auto = hf_package("transformers", "a model's configuration").AutoConfig
    folder = Path(path).expanduser()
    try:
        if (folder / adapters.CONFIG).is_file():
            return _found(adapters.base_of(folder))[0], f"folder {folder}"
        if folder.is_dir():
            return auto.from_pretrained(str(folder)), f"folder {folder}"
    except (OSError, ValueError) as error:
        raise _unusable(path, error) from error
    if looks_like_a_folder(path):
        raise ModelError(f"model.path: {path!r} is no folder; accepted: a model's folder, a hub id, or 'recipe:NAME'")
    try:
        return auto.from_pretrained(path, local_files_only=True), "the hub's files on this machine"
    except (OSError, ValueError):
        pass
    if path in KNOWN:
        fields = dict(KNOWN[path])
        return auto.for_model(fields.pop("model_type"), **fields), f"what is published of {path}"
    try:
        return auto.from_pretrained(path), "the hub"
    except Exception as error:  # the library raises whatever its network client raises
        raise _unusable(path, error) from error


def _unusable(path: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:200]
    return ModelError(
        f"model.path: {path!r} has no configuration that can be read ({type(error).__name__}: {reason}); "
        "accepted: a model's folder, a hub id, or 'recipe:NAME'"
    )
