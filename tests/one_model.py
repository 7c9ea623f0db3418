"""One model of a fleet as an ordinary torch program: transformers, peft, or a few lines of torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from lbw_rl.envs.families.fine_tuned import FineTunedShape
from lbw_rl.envs.families.lora import LoRAShape
from lbw_rl.envs.families.ngram import NGramShape
from lbw_rl.envs.families.pretraining import pretrained
from lbw_rl.envs.families.quadratic import QuadraticShape
from lbw_rl.envs.fleet import Fleet, FleetShape

TRANSFORMER = {"vocab": 32, "width": 16, "layers": 2, "heads": 2, "ffn": 24, "init_std": 0.05}
SHAPES = {
    "llama": FleetShape(**TRANSFORMER),
    "qwen2": FleetShape(**TRANSFORMER, qkv_bias=True),
    "ngram": NGramShape(vocab=32, context=3, width=6, hidden=20),
    "quadratic": QuadraticShape(rows=4, columns=6),
    "lora": LoRAShape(FleetShape(**TRANSFORMER), rank=3, alpha=6.0, pretraining_steps=40),
    "fine-tuned": FineTunedShape(FleetShape(**TRANSFORMER), pretraining_steps=40),
}
HF_NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

Reference = tuple[nn.Module, Callable[[Tensor], Tensor]]
"""A module, and its loss on one model's batch."""


def fleet_of(n: int, shape=SHAPES["llama"], seed: int = 0) -> Fleet:
    fleet = Fleet(n, shape)
    fleet.reset(range(n), [np.random.default_rng([seed, i]) for i in range(n)])
    return fleet


def batches_for(n: int, steps: int, shape=SHAPES["llama"]) -> Tensor:
    """Random batches, shape (steps, n, …)."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(shape, QuadraticShape):
        return torch.randn(steps, n, shape.rows, shape.columns, generator=generator)
    return torch.randint(0, shape.vocab, (steps, n, 3, 9), generator=generator)


def reference(fleet: Fleet, row: int) -> Reference:
    """The model in `row` as it is now, with its own weights."""
    weights = {name: value[row].detach().clone() for name, value in fleet.named_parameters()}
    shape = fleet.shape.base if isinstance(fleet.shape, FineTunedShape) else fleet.shape
    if isinstance(shape, FleetShape):
        return _language_model(transformer_of(shape, weights))
    if isinstance(shape, LoRAShape):
        return _language_model(_adapted(shape, weights))
    if isinstance(shape, NGramShape):
        return _ngram(shape, weights)
    assert isinstance(shape, QuadraticShape)
    return _quadratic(shape, weights["theta"])


def _language_model(model: nn.Module) -> Reference:
    return model, lambda tokens: model(input_ids=tokens, labels=tokens).loss


def rotary_order(shape: FleetShape) -> Tensor:
    """Rows of q and k: the fleet pairs neighbouring channels, transformers pairs the halves of a head."""
    width = shape.width // shape.heads
    head = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])
    return torch.cat([head + width * h for h in range(shape.heads)])


def transformer_of(shape: FleetShape, weights: dict[str, Tensor]) -> PreTrainedModel:
    """transformers' own Llama or Qwen2, which has its own rotary base, epsilon and biases, with these weights."""
    settings = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "tie_word_embeddings": True,
    }
    model = Qwen2ForCausalLM(Qwen2Config(**settings)) if shape.qkv_bias else LlamaForCausalLM(LlamaConfig(**settings))
    state = model.state_dict()
    for name, value in weights.items():
        layer, _, kind = name.rpartition(".")
        kind, bias = kind.removesuffix("_bias"), kind.endswith("_bias")
        if kind in ("q", "k"):
            value = value[rotary_order(shape)]
        key = (f"model.layers.{layer}." if layer else "") + HF_NAMES[kind] + (".bias" if bias else ".weight")
        assert state[key].shape == value.shape
        state[key] = value
    model.load_state_dict(state)
    model.tie_weights()
    return model


def _adapted(shape: LoRAShape, weights: dict[str, Tensor]) -> nn.Module:
    """peft's LoRA on transformers' Llama."""
    from peft import LoraConfig, get_peft_model

    frozen = pretrained(shape.base, shape.pretraining_steps)
    base = transformer_of(shape.base, {name: value[0] for name, value in frozen.items()})
    targets = [name.rpartition(".")[2] for name in HF_NAMES.values() if name.endswith("_proj")]
    config = LoraConfig(r=shape.rank, lora_alpha=shape.alpha, target_modules=targets, lora_dropout=0.0)
    model = get_peft_model(base, config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            layer, kind, side = name.split(".")
            if kind in ("q", "k") and side == "b":
                value = value[rotary_order(shape.base)]
            path = f"base_model.model.model.layers.{layer}.{HF_NAMES[kind]}.lora_{side.upper()}.default.weight"
            parameters[path].copy_(value)
    return model


def _ngram(shape: NGramShape, weights: dict[str, Tensor]) -> Reference:
    model = nn.Sequential(
        nn.Embedding(shape.vocab, shape.width),
        nn.Flatten(),
        nn.Linear(shape.context * shape.width, shape.hidden),
        nn.Tanh(),
        nn.Linear(shape.hidden, shape.vocab),
    )
    names = ("embed", "hidden", "hidden_bias", "output", "output_bias")
    model.load_state_dict(dict(zip(model.state_dict(), (weights[name] for name in names), strict=True)))

    def loss(tokens: Tensor) -> Tensor:
        k = shape.context
        pairs = [(row[i : i + k], row[i + k]) for row in tokens for i in range(len(row) - k)]
        contexts, targets = (torch.stack(part) for part in zip(*pairs, strict=True))
        return nn.functional.cross_entropy(model(contexts), targets)

    return model, loss


def _quadratic(shape: QuadraticShape, theta: Tensor) -> Reference:
    """½ (K θ − e)ᵀ diag(h) (K θ − e) with the dense K, read off the family by its values on unit vectors."""
    model = nn.Module()
    model.theta = nn.Parameter(theta)
    unit = torch.eye(theta.numel()).view(-1, *theta.shape)
    # With e = 0 along one coordinate and θ = 0, the loss is ½ h + floor; with θ a unit vector, the gradient of e is K.
    none = {"theta": torch.zeros_like(unit)}
    curvature = 2.0 * (shape.losses(none, unit) - shape.floor)
    displacement = torch.zeros_like(unit, requires_grad=True)
    shape.losses({"theta": unit}, displacement).sum().backward()
    rotation = -(displacement.grad.flatten(1) / curvature).T

    def loss(batch: Tensor) -> Tensor:
        offset = rotation @ model.theta.flatten() - batch.flatten()
        return 0.5 * offset @ (curvature * offset) + shape.floor

    return model, loss
