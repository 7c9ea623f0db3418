"""What a run will need, before anything is loaded: parameters, memory per device, tokens, FLOPs and time.

Everything follows from the shapes of the model on the meta device and the recipe's numbers. The rate at which the
device computes is the one assumption; it is printed as such.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from lbw_rl.envs.model import ModelError, looks_like_a_folder, outline, parameter_count
from lbw_rl.envs.recipe import OptimizerSpec, Recipe
from lbw_rl.envs.recipe_models import recipe_of
from lbw_rl.governor import Governor
from lbw_rl.training_runs.checkpoints import KEPT
from lbw_rl.training_runs.model_shapes import model_config

UTILISATION = 0.4
"""Share of a matrix product's rate that a training step is assumed to reach; published large runs report 0.3 to 0.5."""

FORMULAS = {
    "activations": "per token of a micro-batch and layer e(2a + 2k + 3i) + 8h + 4·heads, nothing recomputed, and e(4h + i) "
    "where all is trained or the float32 inputs of LoRA's matrices; a, k, i, h: widths of attention, keys, feed-forward and "
    "residual stream, e: bytes of an element",
    "logits": "tokens of a micro-batch × vocabulary × (logits, log-softmax and their gradient in float32, 4 bytes each, "
    "and 2 bytes of bfloat16)",
    "flops": "per token 4·N + 2·(trainable N) + 12·layers·length·heads·head_dim, N weights in matrix products: 6·N where all "
    "are trained; 2·N per token of evaluation",
}


@dataclass(frozen=True)
class Estimate:
    """A run's needs. Bytes are per device; a sharded run splits weights, gradients and optimizer state (FSDP).

    Attributes:
        recipe: its name.
        source: where the model's shape comes from.
        parameters, trainable: weights in all, and those that training moves; tied ones count once.
        devices: how many share the weights.
        memory: item → bytes at the same time, an upper bound; the allocator's and the driver's own are not in it.
        snapshot: bytes of host memory for the governor's last good state; 0 without rollbacks.
        snapshot_budget: what the governor spends on it at most: a larger one is not kept.
        checkpoints: bytes on disk at most, while a run is not finished.
        steps, tokens_per_step, tokens: optimizer steps, and tokens that they read.
        flops: of the whole run, evaluations included.
        tflops: assumed 10^12 floating-point operations per second and device.
        assumption: where that figure comes from.
        seconds: flops over the rate of all devices.
    """

    recipe: str
    source: str
    parameters: int
    trainable: int
    devices: int
    memory: dict[str, int]
    snapshot: int
    snapshot_budget: int
    checkpoints: int
    steps: int
    tokens_per_step: int
    tokens: int
    flops: float
    tflops: float
    assumption: str
    seconds: float

    @property
    def memory_total(self) -> int:
        """Bytes per device, all items together."""
        return sum(self.memory.values())


def estimate(recipe: Recipe, devices: int = 1, tflops: float | None = None) -> Estimate:
    """Estimates a recipe's run. Nothing is trained, and no weights are read.

    Args:
        recipe: the run; its controller does not matter.
        devices: how many share weights, gradients and optimizer state (FSDP), and the micro-batches of a step.
        tflops: sustained rate per device, 10^12 operations per second; measured here where it is None.

    Raises:
        ValueError: `devices` or `tflops` out of range.
        ModelError, RecipeError, ModuleNotFoundError: see `model_config`.
    """
    if devices < 1:
        raise ValueError(f"devices: {devices} is too few; accepted: 1 or more")
    if tflops is not None and not (math.isfinite(tflops) and tflops > 0):
        raise ValueError(f"tflops: {tflops} is no rate; accepted: a positive number")
    config, source = model_config(recipe)
    model = outline(recipe.model, config)
    train, data = recipe.train, recipe.data
    trained = [p for p in model.parameters() if p.requires_grad]
    weights, gradients, state = _bytes(model.parameters()), _bytes(trained), optimizer_bytes(recipe.optimizer, trained)
    micro_tokens = train.batch_size * data.sequence_length
    element = torch.finfo(getattr(torch, recipe.model.dtype)).bits // 8
    memory = {
        "weights": _share(weights, devices),
        "gradients": _share(gradients, devices),
        "optimizer state": _share(state, devices),
        "optimizer step": _share(gradients if recipe.optimizer.implementation == "foreach" else 0, devices),
        "gathered layers": 2 * _largest_layer(model) if devices > 1 else 0,
        "activations": activation_bytes(recipe, config) * config.num_hidden_layers * micro_tokens,
        "logits": micro_tokens * config.vocab_size * (12 if element == 4 else 12 + element),
    }
    tokens_per_step = micro_tokens * train.accumulation
    tokens = tokens_per_step * train.steps
    flops = tokens * flops_per_token(model, config, data.sequence_length) + _evaluation_flops(recipe, model)
    rate, assumption = (tflops, "--tflops, sustained") if tflops is not None else _measured(recipe)
    kept = gradients if recipe.model.lora_rank else weights
    return Estimate(
        recipe=recipe.name,
        source=source,
        parameters=parameter_count(model),
        trainable=sum(p.numel() for p in trained),
        devices=devices,
        memory=memory,
        snapshot=_share(gradients + state, devices) if recipe.authority.max_rollbacks else 0,
        snapshot_budget=signature(Governor).parameters["snapshot_bytes"].default,
        checkpoints=(KEPT + 1) * (kept + state) if train.checkpoint_every else 0,
        steps=train.steps,
        tokens_per_step=tokens_per_step,
        tokens=tokens,
        flops=flops,
        tflops=rate,
        assumption=assumption,
        seconds=flops / (rate * 1e12 * devices),
    )


def optimizer_bytes(spec: OptimizerSpec, parameters: Sequence[torch.Tensor]) -> int:
    """What the optimizer keeps of each parameter after its first step, in the parameter's own type."""
    if spec.name == "adafactor":  # a row and a column of means for a matrix (Shazeer & Stern 1804.04235)
        sizes = [p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.ndim > 1 else p.numel() for p in parameters]
        return sum(n * p.element_size() for n, p in zip(sizes, parameters))
    copies = {
        "adamw": 2,  # both moments
        "stable-adamw": 2,
        "schedule-free": 2,  # z and the second moment
        "prodigy": 4,  # both moments, s and the starting point
        "sgd": 1 if spec.momentum else 0,
    }
    return copies[spec.name] * _bytes(parameters)


def activation_bytes(recipe: Recipe, config: Any) -> int:
    """Bytes that autograd keeps per token and layer of a Llama- or Qwen2-style block with fused attention.

    With e bytes per element of the model's type, width h, attention width a = heads·head_dim, keys and values k each,
    feed-forward width i: inputs and outputs of the attention product e(2a + 2k) and its float32 normaliser
    4·heads; gate, its activation and up, 3·e·i; the float32 inputs of both norms, 4·2h. Trained weights keep the inputs
    of their layers too: e(4h + i). LoRA of rank r on n layers keeps the inputs of its A in float32, those of its B,
    4·n·r, and, where the model is bfloat16, one copy for each A.
    """
    model = recipe.model
    e = 4 if model.dtype == "float32" else 2
    h, i, heads = config.hidden_size, _inner(config), config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or h // heads
    a, k = heads * head_dim, (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    common = e * (2 * a + 2 * k + 3 * i) + 4 * heads + 8 * h
    if model.lora_rank is None:
        return common + e * (4 * h + i)
    everywhere = model.lora_targets == "all-linear"
    if e == 4:  # what an adapter reads is kept once, and attention's output is kept already
        inputs = 2 * h + i if everywhere else h
    else:
        inputs = 5 * h + a + i if everywhere else 3 * h + a
    return common + 4 * (inputs + model.lora_rank * (7 if everywhere else 4))


def flops_per_token(model: torch.nn.Module, config: Any, length: int) -> float:
    """Floating-point operations of forward and backward pass: `FORMULAS["flops"]` (Kaplan et al. 2001.08361, PaLM's B)."""
    all_weights, trained = _in_products(model)
    attention = 12 * config.num_hidden_layers * length * config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4 * all_weights + 2 * trained + attention * head_dim


def _evaluation_flops(recipe: Recipe, model: torch.nn.Module) -> float:
    train, data = recipe.train, recipe.data
    evaluations = 2 + (train.steps // train.eval_every if train.eval_every else 1)
    return 2.0 * _in_products(model)[0] * evaluations * data.eval_sequences * data.sequence_length


def _in_products(model: torch.nn.Module) -> tuple[int, int]:
    """Weights that are multiplied with activations: all of them, and the trained ones. A look-up multiplies nothing."""
    output = model.get_output_embeddings()  # type: ignore[operator]
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)} - {id(output.weight)}
    used = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in looked_up]
    return sum(p.numel() for p in used), sum(p.numel() for p in used if p.requires_grad)


def _inner(config: Any) -> int:
    return int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _share(size: int, devices: int) -> int:
    return -(-size // devices)


def _largest_layer(model: torch.nn.Module) -> int:
    """Bytes of the largest part that FSDP gathers as one: a block or an embedding."""
    lists = [block for m in model.modules() if isinstance(m, torch.nn.ModuleList) for block in m]
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    return max((_bytes(m.parameters()) for m in [*lists, *tables]), default=0)


def _measured(recipe: Recipe) -> tuple[float, str]:
    """The rate that a training step may reach here, 10^12 operations per second, and how that was found."""
    wanted = recipe.train.device
    name = "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"
    size = 8192 if name == "cuda" else 512
    matrix = torch.ones(size, size, dtype=getattr(torch, recipe.model.dtype), device=name)
    seconds = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        product = matrix @ matrix
        float(product[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    peak = 2 * size**3 / min(seconds) / 1e12
    return UTILISATION * peak, (
        f"{UTILISATION:.0%} of the {peak:.3g} TFLOP/s that a {recipe.model.dtype} matrix product reaches here ({name})"
    )


def in_words(found: Estimate) -> list[str]:
    """The estimate as lines of text, the assumption and the formulas last."""
    gb = {name: size for name, size in found.memory.items() if size}
    items = ", ".join(f"{name} {_size(size)}" for name, size in gb.items())
    sharded = f" of {found.devices}, sharded (FSDP)" if found.devices > 1 else ""
    rollbacks = _size(found.snapshot) if found.snapshot else "none (authority.max_rollbacks is 0)"
    if found.snapshot > found.snapshot_budget:
        rollbacks += f", over the governor's budget of {_size(found.snapshot_budget)}, so that none is kept"
    return [
        f"{found.recipe}: {found.parameters:,} parameters, {found.trainable:,} trained ({found.trainable / found.parameters:.2%}); "
        f"shape from {found.source}",
        f"memory per device{sharded}: about {_size(found.memory_total)} = {items}",
        f"host memory for the governor's last good state: {rollbacks}; checkpoints on disk: up to {_size(found.checkpoints)}",
        f"{found.steps:,} steps × {found.tokens_per_step:,} tokens = {found.tokens:,} tokens, {found.flops:.3g} FLOPs",
        f"time: about {_duration(found.seconds)} on {found.devices} device{'s' if found.devices > 1 else ''}, assumed at "
        f"{found.tflops:.3g} TFLOP/s each: {found.assumption}",
        *(
            ["a model this small is bound by overhead, not by FLOPs: it takes several times as long"]
            * (found.parameters < 10_000_000)
        ),
        *(f"{name}: {formula}" for name, formula in FORMULAS.items()),
    ]


def in_short(found: Estimate) -> str:
    """The estimate on one line."""
    return (
        f"{found.recipe}: {found.parameters:,} parameters, {found.trainable:,} trained; about {_size(found.memory_total)} of "
        f"memory, {found.tokens:,} tokens, {_duration(found.seconds)} (at {found.tflops:.3g} TFLOP/s, assumed); "
        "--dry-run says how that is made up"
    )


def notice(recipe: Recipe) -> str | None:
    """`in_short` of a run that is worth a thought before it starts: over 100 million parameters, or from a hub id.

    Raises:
        ModelError, RecipeError, ModuleNotFoundError: see `model_config`.
    """
    path = recipe.model.path
    folder = Path(path or "").expanduser()
    local = path is None or recipe_of(path) is not None or folder.exists()
    if path is not None and folder.is_dir() and not any(folder.glob("*.safetensors")):
        return None  # the run will say what is missing
    try:
        found = estimate(recipe)
    except ModelError:
        if local or looks_like_a_folder(str(path)):
            return None  # likewise
        raise
    return in_short(found) if not local or found.parameters > 100_000_000 else None


def _size(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} bytes"


def _duration(seconds: float) -> str:
    for unit, scale in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.0f} seconds"
