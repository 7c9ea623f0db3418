"""LoRA adapters on a frozen model (Hu et al. 2106.09685), through `peft`."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lbw_rl.envs.extras import hf_package
from lbw_rl.envs.recipe import ModelSpec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of an adapter folder."""

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_DIGEST_SAMPLE = 64  # elements of each frozen tensor: another model differs nearly everywhere


def add_adapters(model: Any, spec: ModelSpec) -> Any:
    """Freezes a model and puts LoRA adapters of `spec.lora_rank` on it; A is drawn from torch's CPU generator, B is 0.

    Adapters are float32 whatever the type of the frozen weights, as `peft` makes them: an update of a bfloat16 weight
    at a usual rate is below what that type resolves.

    Args:
        model: a Hugging Face causal language model; becomes part of what is returned.
        spec: the recipe's `[model]` section.

    Returns:
        `peft`'s model; its adapters alone have `requires_grad`.

    Raises:
        ValueError: no layer of the wanted kind, in one line.
        ModuleNotFoundError: without the extra `lbw-rl[hf]`.
    """
    peft = hf_package("peft", "model.lora_rank")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.lora_rank,
        lora_alpha=spec.lora_alpha,
        target_modules="all-linear" if spec.lora_targets == "all-linear" else list(_ATTENTION),
        lora_dropout=0.0,
        bias="none",
    )
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if spec.lora_targets == "attention" and not names.issuperset(_ATTENTION):
        raise ValueError(
            f"model.lora_targets: 'attention' means layers named {', '.join(_ATTENTION)}, which "
            f"{type(model).__name__} has not; accepted: 'all-linear'"
        )
    with _without_future_warnings():
        return peft.get_peft_model(model, config)


def has_adapters(model: torch.nn.Module) -> bool:
    """Whether `add_adapters` made it."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def base_of(folder: Path) -> str:
    """The folder or hub id of the model that an adapter folder was trained on.

    Raises:
        ValueError: it names none.
    """
    try:
        base = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{CONFIG} cannot be read ({type(error).__name__})") from error
    if not isinstance(base, str) or not base:
        raise ValueError(f"{CONFIG} names no base model (base_model_name_or_path)")
    return base


def merge_adapters(model: Any, folder: Path) -> Any:
    """The model with the adapters of a folder added to its weights, as one that never had any."""
    peft = hf_package("peft", "an adapter folder as model.path")
    with _without_future_warnings():
        merged = peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    return merged.requires_grad_(True)  # peft froze it


def trained_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name → the weights that training moves, live; all of the state where nothing is frozen."""
    if not has_adapters(model):
        return dict(model.state_dict())
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_trained_state(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Restores `trained_state`.

    Raises:
        RuntimeError: names or shapes are not the model's.
    """
    if not has_adapters(model):
        model.load_state_dict(state)
        return
    differing = sorted(state.keys() ^ trained_state(model).keys())
    if differing:
        raise RuntimeError(f"{len(differing)} adapter weights are in one of the two alone, first {differing[0]}")
    model.load_state_dict(state, strict=False)


def frozen_digest(model: torch.nn.Module) -> str:
    """Hex digest over a sample of the weights that training leaves alone; empty where there are none.

    A checkpoint without the frozen weights goes with the model that it was trained on and with no other.
    """
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    if not frozen:
        return ""
    digest = hashlib.sha256()
    for name, p in frozen:
        flat = p.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // _DIGEST_SAMPLE)].float().cpu()
        digest.update(f"{name}{tuple(p.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _without_future_warnings() -> Iterator[None]:
    """Those of transformers about names that peft still uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
