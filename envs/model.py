"""The model of a run: fresh from an architecture, or pretrained from a folder or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lbw_rl.envs import adapters
from lbw_rl.envs.extras import bars_on_terminals_only, hf_package
from lbw_rl.envs.recipe import ModelSpec

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FRESH = {"qwen2": ("Qwen2Config", "Qwen2ForCausalLM"), "llama": ("LlamaConfig", "LlamaForCausalLM")}
_ACCEPTED = (
    "accepted: a folder with config.json and *.safetensors, as save_pretrained writes it, one of LoRA adapters, or the "
    "hub id of a causal language model"
)


class ModelError(ValueError):
    """A model that cannot be built. One line that names the field, its value and what is accepted."""


def build_model(spec: ModelSpec, vocab_size: int, max_positions: int, seed: int) -> torch.nn.Module:
    """Builds a Hugging Face causal language model on the CPU, without dropout and without a key-value cache.

    With `spec.lora_rank` its weights are frozen, and LoRA adapters alone have `requires_grad`.

    Args:
        spec: the recipe's `[model]` section; `path` is a folder or a hub id, see `recipe_models.model_folder`.
        vocab_size: entries of the tokenizer: a fresh model's vocabulary; a pretrained one needs as many.
        max_positions: longest sequence that it will read, tokens.
        seed: of a fresh model's weights, or of the adapters'. The global random state is left as it was.

    Raises:
        ModelError: `model.path` holds no usable model, or one whose vocabulary or context is too small; or no layer
            takes the adapters.
        ModuleNotFoundError: without the extra `lbw-rl[hf]`.
    """
    transformers = hf_package("transformers", "a Qwen2 or Llama model")
    # Only the CPU generator is forked and seeded: torch.manual_seed would reseed every accelerator as well.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if spec.path is None:
            config = fresh_config(spec, vocab_size, max_positions)
            model = getattr(transformers, _FRESH[str(spec.architecture)][1])(config).to(_DTYPES[spec.dtype])
        else:
            model = _pretrained(transformers, spec.path, _DTYPES[spec.dtype])
            check_fit(model.config, spec.path, vocab_size, max_positions)
        if spec.lora_rank is not None:
            model = _with_adapters(model, spec)
    model.config.use_cache = False
    return model


def outline(spec: ModelSpec, config: Any) -> torch.nn.Module:
    """The model that `build_model` would train, on the meta device: shapes and types without memory or weights.

    Args:
        spec: the recipe's `[model]` section.
        config: of the model, as transformers has it.

    Raises:
        ModelError: no layer takes the adapters.
    """
    transformers = hf_package("transformers", "a Qwen2 or Llama model")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=_DTYPES[spec.dtype])
        return model if spec.lora_rank is None else _with_adapters(model, spec)


def _with_adapters(model: Any, spec: ModelSpec) -> Any:
    if spec.path is not None:  # what the saved adapters will name as their base, from whatever folder they are read
        folder = Path(spec.path).expanduser()
        model.name_or_path = str(folder.resolve()) if folder.is_dir() else spec.path
    try:
        return adapters.add_adapters(model, spec)
    except ValueError as error:
        raise ModelError(" ".join(str(error).split())) from error


def looks_like_a_folder(path: str) -> bool:
    """Whether it can be no hub id: those are a name, or an owner and a name."""
    return path.startswith(("/", ".", "~")) or path.count("/") > 1


def parameter_count(model: torch.nn.Module) -> int:
    """Number of weights; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


def fresh_config(spec: ModelSpec, vocab_size: int, max_positions: int) -> Any:
    """transformers' configuration of a fresh model, of Qwen2 or Llama as `spec.architecture` says."""
    transformers = hf_package("transformers", "a Qwen2 or Llama model")
    return getattr(transformers, _FRESH[str(spec.architecture)][0])(
        vocab_size=vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=spec.tie_embeddings,
        # The architectures' default ids belong to their own tokenizers and lie outside a small vocabulary.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attention_dropout=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )


def _pretrained(transformers: Any, path: str, dtype: torch.dtype) -> Any:
    folder = Path(path).expanduser()
    if (folder / adapters.CONFIG).is_file():
        return _adapted(transformers, folder, path, dtype)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.path: {path!r} has no config.json; {_ACCEPTED}")
        if not any(folder.glob("*.safetensors")):
            raise ModelError(f"model.path: {path!r} has no weights (*.safetensors); {_ACCEPTED}")
        path = str(folder)
    elif folder.exists() or looks_like_a_folder(path):
        raise ModelError(f"model.path: {path!r} is no folder; {_ACCEPTED}")
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        for name in vars(config):  # dropout would draw from the global random state, step after step
            if name.endswith(("dropout", "pdrop")) and isinstance(getattr(config, name), float):
                setattr(config, name, 0.0)
        with bars_on_terminals_only():
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # the library raises whatever its readers and its network client raise
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"model.path: {path!r} could not be loaded ({type(error).__name__}: {reason}); {_ACCEPTED}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        # transformers only warns, and trains on from random weights.
        raise ModelError(f"model.path: {path!r} lacks {len(missing)} weights, first {missing[0]}; {_ACCEPTED}")
    return model


def _adapted(transformers: Any, folder: Path, path: str, dtype: torch.dtype) -> Any:
    """The base of an adapter folder with its adapters merged: a model like any other."""
    try:
        base = adapters.base_of(folder)
        if not (folder / adapters.WEIGHTS).is_file():  # peft would look for it on the hub
            raise ValueError(f"no {adapters.WEIGHTS}")
        return adapters.merge_adapters(_pretrained(transformers, base, dtype), folder)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # peft raises whatever its readers raise
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"model.path: {path!r} holds LoRA adapters that cannot be used: {reason}") from error


def check_fit(config: Any, path: str, vocab_size: int, max_positions: int) -> None:
    """Compares a pretrained model's vocabulary and context with what the run needs.

    Raises:
        ModelError: one of them is too small.
    """
    if vocab_size > config.vocab_size:
        raise ModelError(
            f"model.path: {path!r} has a vocabulary of {config.vocab_size}, the tokenizer {vocab_size}; "
            "accepted: data.tokenizer = 'model', or a data.vocab_size within the model's"
        )
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and max_positions > context:
        raise ModelError(
            f"model.path: {path!r} reads at most {context} tokens; accepted: data.sequence_length up to that, "
            f"not {max_positions}"
        )
