"""The batched fleet against one-model references: transformers' Llama and torch's AdamW."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from measuring import Measuring
from transformers import LlamaConfig, LlamaForCausalLM

from lbw_rl.entropy import direction_entropy, element_entropy, histogram_entropy
from lbw_rl.envs.fleet import Fleet, FleetShape
from lbw_rl.envs.fleet_signals import FleetProbe, direction_entropies, element_entropies, gradient_entropies

NOT_OF_PROXIES = {"grad_entropy_softmax", "grad_entropy_tensor"}
"""Signals of the probe that nobody has asked of a fleet: missing there."""

SHAPE = FleetShape(vocab=32, width=16, layers=2, heads=2, ffn=24, init_std=0.05)
HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "out": "self_attn.o_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "attention_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings
    yield
    torch.set_num_threads(threads)


def fleet_of(n: int, shape: FleetShape = SHAPE, seed: int = 0) -> Fleet:
    fleet = Fleet(n, shape)
    fleet.reset(range(n), [np.random.default_rng([seed, i]) for i in range(n)])
    return fleet


def tokens_for(n: int, steps: int, shape: FleetShape = SHAPE) -> torch.Tensor:
    return torch.randint(0, shape.vocab, (steps, n, 3, 9), generator=torch.Generator().manual_seed(1))


def rotary_order(shape: FleetShape) -> torch.Tensor:
    """Rows of q and k: the fleet pairs neighbouring channels, transformers pairs the halves of a head."""
    width = shape.width // shape.heads
    head = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])
    return torch.cat([head + width * h for h in range(shape.heads)])


def llama_of(fleet: Fleet, row: int) -> LlamaForCausalLM:
    s = fleet.shape
    config = LlamaConfig(
        vocab_size=s.vocab,
        hidden_size=s.width,
        intermediate_size=s.ffn,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.heads,
        tie_word_embeddings=True,
        rms_norm_eps=s.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": s.rope_theta},
    )
    model = LlamaForCausalLM(config)
    state = model.state_dict()
    for name, value in fleet.named_parameters():
        layer, _, kind = name.rpartition(".")
        value = value[row].detach()
        if kind in ("q", "k"):
            value = value[rotary_order(s)]
        state[(f"model.layers.{layer}." if layer else "") + HF_NAMES[kind]] = value.clone()
    model.load_state_dict(state)
    model.tie_weights()
    return model


def test_trajectory_equals_llama_under_torch_adamw() -> None:
    n, steps = 3, 24
    fleet, tokens = fleet_of(n), tokens_for(n, steps)
    lr, beta1, beta2 = np.array([5e-3, 3e-3, 1e-2]), np.array([0.9, 0.8, 0.95]), np.array([0.99, 0.95, 0.999])
    decay, clip = np.array([0.1, 0.0, 0.5]), np.array([np.inf, 0.3, 1.0])
    models = [llama_of(fleet, i) for i in range(n)]
    optimizers = [
        torch.optim.AdamW(m.parameters(), lr=lr[i], betas=(beta1[i], beta2[i]), weight_decay=decay[i])
        for i, m in enumerate(models)
    ]
    for t in range(steps):
        losses = fleet.backward(tokens[t])
        norms = fleet.grad_norms()
        scale = 1.0 + 0.5 * (t % 3)  # hyper-parameters may change from step to step
        fleet.step(lr * scale, beta1, beta2, weight_decay=decay, clip=clip)
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.param_groups[0]["lr"] = lr[i] * scale
            optimizer.zero_grad()
            loss = model(input_ids=tokens[t, i], labels=tokens[t, i]).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip[i])
            optimizer.step()
            assert losses[i] == pytest.approx(loss.item(), rel=1e-4)
            assert norms[i] == pytest.approx(norm.item(), rel=1e-3)
    final = fleet.evaluate(tokens[0])
    for i, model in enumerate(models):
        assert final[i] == pytest.approx(model(input_ids=tokens[0, i], labels=tokens[0, i]).loss.item(), rel=5e-4)


def test_reset_leaves_the_others_bitwise_alone() -> None:
    tokens = tokens_for(4, 8)
    settings = np.full(4, 1e-2), np.full(4, 0.9), np.full(4, 0.99)
    with_reset, without = fleet_of(4), fleet_of(4)
    for t in range(8):
        for fleet in (with_reset, without):
            fleet.backward(tokens[t])
            fleet.step(*settings, weight_decay=0.1)
        if t == 3:
            with_reset.reset([1], [np.random.default_rng(9)])
    others = [0, 2, 3]
    assert torch.equal(with_reset.weights[others], without.weights[others])
    assert torch.equal(with_reset.optimizer.square[others], without.optimizer.square[others])
    assert not torch.equal(with_reset.weights[1], without.weights[1])
    assert with_reset.optimizer.steps.tolist() == [8, 4, 8, 8]


def test_same_seed_same_bits_and_equal_rows_stay_equal() -> None:
    """A model's bits depend neither on its place in the fleet nor on its neighbours."""
    a, b = fleet_of(5), fleet_of(5)
    for fleet in (a, b):
        fleet.weights.data[4] = fleet.weights.data[0]
    tokens = tokens_for(5, 6)
    tokens[:, 4] = tokens[:, 0]
    for t in range(6):
        for fleet in (a, b):
            fleet.backward(tokens[t])
            fleet.step(np.full(5, 3e-2), np.full(5, 0.9), np.full(5, 0.99))
    assert torch.equal(a.weights, b.weights)
    assert torch.equal(a.weights[0], a.weights[4])


def test_copy_and_paste_grads_continue_the_models() -> None:
    fleet, tokens = fleet_of(4), tokens_for(4, 2)
    fleet.backward(tokens[0])
    fleet.step(np.full(4, 1e-2), np.full(4, 0.9), np.full(4, 0.99))
    part = fleet.copy([2, 0])
    assert np.allclose(part.backward(tokens[1][[2, 0]]), fleet.backward(tokens[1])[[2, 0]], rtol=1e-6)
    before = fleet.grads.clone()
    fleet.paste_grads([2, 0], part)
    assert torch.allclose(fleet.grads, before, atol=1e-6)


def test_a_broken_model_does_not_spread() -> None:
    fleet, tokens = fleet_of(3), tokens_for(3, 3)
    fleet.weights.data[1, 0] = float("nan")
    for t in range(3):
        losses = fleet.backward(tokens[t])
        fleet.step(np.full(3, 1e-2), np.full(3, 0.9), np.full(3, 0.99), clip=np.full(3, 1.0))
    assert np.isfinite(losses).tolist() == [True, False, True]


def test_shape_refuses_odd_heads() -> None:
    with pytest.raises(ValueError, match="width=30"):
        FleetShape(width=30, heads=4)


def test_signals_equal_those_of_the_probe() -> None:
    """Every signal of the fleet is what `lbw_rl.probe` measures on the same model."""
    n, steps, every = 2, 9, 2
    fleet, tokens = fleet_of(n), tokens_for(n, steps)
    ours = FleetProbe(fleet, stride=1)
    lr, beta1, beta2 = np.array([1e-2, 3e-2]), np.full(n, 0.9), np.array([0.99, 0.95])
    models = [llama_of(fleet, i) for i in range(n)]
    optimizers = [
        torch.optim.AdamW(m.parameters(), lr=lr[i], betas=(0.9, beta2[i]), weight_decay=0.0)
        for i, m in enumerate(models)
    ]
    theirs = [Measuring(o, sample=10**6) for o in optimizers]
    compared = set()
    for t in range(steps):
        losses = fleet.backward(tokens[t])
        measured = ours.measure(losses, beta2) if t % every == 0 else None
        last_of_window = (t + 1) % every == 0
        if last_of_window:
            ours.before_step()
        fleet.step(lr, beta1, beta2)
        if last_of_window:
            ours.after_step()
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            loss = model(input_ids=tokens[t, i], labels=tokens[t, i]).loss
            loss.backward()
            if measured is not None:
                for name, value in theirs[i].measure(loss).items():
                    if name in NOT_OF_PROXIES:
                        continue
                    assert measured[name][i] == pytest.approx(value, rel=0.01, abs=2e-3), (name, t)
                    compared.add(name)
            if last_of_window:
                theirs[i].before_step()
            optimizer.step()
            if last_of_window:
                theirs[i].after_step()
    assert compared >= {"loss", "grad_norm", "grad_entropy", "grad_cosine", "surprise", "update_ratio", "weight_rms"}
    assert compared >= {"grad_entropy_element", "grad_entropy_direction"}
    assert not NOT_OF_PROXIES & set(measured or {})


def test_measuring_some_rows_leaves_the_rest_unmeasured() -> None:
    fleet, tokens = fleet_of(3), tokens_for(3, 1)
    probe = FleetProbe(fleet)
    losses = fleet.backward(tokens[0])
    everything, some = probe.measure(losses, np.full(3, 0.99)), probe.measure(losses, np.full(3, 0.99), rows=[1])
    assert np.isnan(some["grad_norm"][[0, 2]]).all()
    assert some["grad_entropy"][1] == everything["grad_entropy"][1]
    assert np.isnan(everything["surprise"]).all()  # no second moment yet


def test_nonfinite_gradient_is_flagged_and_never_the_reference() -> None:
    fleet, tokens = fleet_of(2), tokens_for(2, 3)
    probe, beta2 = FleetProbe(fleet), np.full(2, 0.99)
    probe.measure(fleet.backward(tokens[0]), beta2)
    losses = fleet.backward(tokens[1])
    fleet.grads[0, 0] = float("inf")
    assert probe.measure(losses, beta2)["nonfinite"].tolist() == [1.0, 0.0]
    assert np.isfinite(probe.measure(fleet.backward(tokens[2]), beta2)["grad_cosine"]).all()


def test_batched_entropies_equal_the_scalar_ones() -> None:
    generator = torch.Generator().manual_seed(2)
    g = torch.randn(4, 999, generator=generator) * torch.tensor([[1.0], [1e-6], [1e3], [0.0]])
    mean = torch.randn(4, 999, generator=generator)
    g[0, :100] = 0.0
    mean[2] = torch.nan
    assert gradient_entropies(g).tolist() == pytest.approx([histogram_entropy(row.numpy()) for row in g], abs=1e-6)
    expected = [element_entropy(row.numpy()) for row in g[:3]]
    assert element_entropies(g)[:3].tolist() == pytest.approx(expected, abs=1e-6)
    expected = [direction_entropy(row.numpy(), m.numpy()) for row, m in zip(g, mean, strict=True)]
    assert direction_entropies(g, mean).tolist() == pytest.approx(expected, abs=1e-5, nan_ok=True)
