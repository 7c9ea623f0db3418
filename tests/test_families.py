"""Every family of the fleet against an ordinary program of one model: transformers, peft, torch, and arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from one_model import SHAPES, TRANSFORMER, batches_for, fleet_of, reference
from transformers import LlamaConfig, Qwen2Config

from lbw_rl.envs.families.catalogue import FAMILIES, family
from lbw_rl.envs.families.fine_tuned import FineTunedShape
from lbw_rl.envs.families.lora import LoRAShape
from lbw_rl.envs.families.pretraining import pretrained
from lbw_rl.envs.families.quadratic import QuadraticShape
from lbw_rl.envs.families.transformer import FleetShape
from lbw_rl.envs.languages import TRAINING_SHARE, python_docs
from lbw_rl.envs.proxy_data import BatchShape
from lbw_rl.envs.tasks import MODELS, sample_tasks


@pytest.mark.parametrize("name", SHAPES)
def test_trajectory_equals_the_one_model_program_under_torch_adamw(name: str) -> None:
    """Losses, gradient norms and held-out losses, step by step, with a model that starts over midway."""
    n, steps, restarted = 3, 24, 1
    shape = SHAPES[name]
    fleet, batches = fleet_of(n, shape), batches_for(n, steps, shape)
    lr, beta1, beta2 = np.array([5e-3, 3e-3, 1e-2]), np.array([0.9, 0.8, 0.95]), np.array([0.99, 0.95, 0.999])
    decay, clip = np.array([0.1, 0.0, 0.5]), np.array([np.inf, 0.3, 1.0])

    def start(i: int) -> tuple:
        model, loss = reference(fleet, i)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr[i], betas=(beta1[i], beta2[i]), weight_decay=decay[i])
        return loss, trained, optimizer

    references = [start(i) for i in range(n)]
    assert sum(p.numel() for p in references[0][1]) == fleet.size
    for t in range(steps):
        if t == steps // 2:
            fleet.reset([restarted], [np.random.default_rng(9)])
            references[restarted] = start(restarted)
        losses = fleet.backward(batches[t])
        norms = fleet.grad_norms()
        scale = 1.0 + 0.5 * (t % 3)  # hyper-parameters may change from step to step
        fleet.step(lr * scale, beta1, beta2, weight_decay=decay, clip=clip)
        for i, (loss_of, trained, optimizer) in enumerate(references):
            optimizer.param_groups[0]["lr"] = lr[i] * scale
            optimizer.zero_grad()
            loss = loss_of(batches[t, i])
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, clip[i])
            optimizer.step()
            assert losses[i] == pytest.approx(loss.item(), rel=1e-4)
            assert norms[i] == pytest.approx(norm.item(), rel=1e-3)
    final = fleet.evaluate(batches[0])
    for i, (loss_of, _, _) in enumerate(references):
        assert final[i] == pytest.approx(loss_of(batches[0, i]).item(), rel=5e-4)


# -- transformers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "config"), [("llama", LlamaConfig()), ("qwen2", Qwen2Config())])
def test_defaults_are_those_of_transformers(name: str, config) -> None:
    shape = FAMILIES[name]
    assert isinstance(shape, FleetShape)
    assert shape.name == name == config.model_type
    assert shape.rope_theta == config.rope_parameters["rope_theta"]
    assert shape.norm_eps == config.rms_norm_eps
    assert shape.init_std == config.initializer_range


def test_a_qwen2_is_a_llama_with_biases_that_start_at_zero() -> None:
    llama, qwen = fleet_of(2, SHAPES["llama"]), fleet_of(2, SHAPES["qwen2"])
    tokens = batches_for(2, 1)[0]
    assert np.array_equal(llama.evaluate(tokens), qwen.evaluate(tokens))
    assert torch.equal(llama.weights[:, : llama.size], qwen.weights[:, : llama.size])
    qwen.weights[:, llama.size : qwen.size] = 0.5
    assert (np.abs(llama.evaluate(tokens) - qwen.evaluate(tokens)) > 1e-5).all()


def test_shape_refuses_odd_heads() -> None:
    with pytest.raises(ValueError, match="width=30"):
        FleetShape(width=30, heads=4)


# -- LoRA --------------------------------------------------------------------------------------------


def test_adapters_start_as_the_pretrained_model_and_leave_it_as_it_is() -> None:
    shape = SHAPES["lora"]
    assert isinstance(shape, LoRAShape)
    before = {name: value.clone() for name, value in pretrained(shape.base, shape.pretraining_steps).items()}
    fleet, base, tokens = fleet_of(3, shape), fleet_of(1, shape.base), batches_for(3, 1)[0]
    for name, value in base.named_parameters():
        value.copy_(before[name])
    assert fleet.evaluate(tokens) == pytest.approx([base.evaluate(tokens[i : i + 1])[0] for i in range(3)], rel=1e-6)
    for _ in range(4):
        fleet.backward(tokens)
        fleet.step(np.full(3, 1e-2), np.full(3, 0.9), np.full(3, 0.99))
    assert all(
        torch.equal(value, before[name]) for name, value in pretrained(shape.base, shape.pretraining_steps).items()
    )


def test_fine_tuning_starts_from_the_pretrained_weights_and_moves_a_copy_of_them() -> None:
    shape = FineTunedShape(FleetShape(**TRANSFORMER), pretraining_steps=10)
    before = {name: value.clone() for name, value in pretrained(shape.base, 10).items()}
    fleet = fleet_of(3, shape)
    assert all(torch.equal(value[i], before[name][0]) for name, value in fleet.named_parameters() for i in range(3))
    fleet.backward(torch.randint(0, shape.vocab, (3, 2, 9), generator=torch.Generator().manual_seed(0)))
    fleet.step(np.full(3, 1e-2), np.full(3, 0.9), np.full(3, 0.99))
    assert not torch.equal(next(fleet.named_parameters())[1][0], before["embed"][0])
    assert all(torch.equal(value, before[name]) for name, value in pretrained(shape.base, 10).items())


def test_the_pretrained_model_has_learned_its_language_also_where_it_was_held_out() -> None:
    shape = LoRAShape(FleetShape(**TRANSFORMER), pretraining_steps=200)
    text = python_docs(shape.vocab)
    held_out = torch.from_numpy(text[int(TRAINING_SHARE * len(text)) :][: 32 * 17].reshape(1, 32, 17))
    fresh, trained = fleet_of(1, shape.base), fleet_of(1, shape)
    unigram = np.bincount(text, minlength=shape.vocab) / len(text)
    entropy = -(unigram * np.log(unigram)).sum()
    assert trained.evaluate(held_out)[0] < entropy - 0.2 < fresh.evaluate(held_out)[0]


# -- the quadratic -----------------------------------------------------------------------------------


def test_the_spectrum_is_a_power_law_in_a_basis_that_is_not_the_axes() -> None:
    shape = QuadraticShape(rows=4, columns=6, power=1.3, excess=2.0)

    def loss(theta: torch.Tensor) -> torch.Tensor:
        return shape.losses({"theta": theta.view(1, 4, 6)}, torch.zeros(1, 4, 6)).sum()

    hessian = torch.autograd.functional.hessian(loss, torch.zeros(24)).double()
    eigenvalues = torch.linalg.eigvalsh(hessian).flip(0)
    law = torch.arange(1, 25, dtype=torch.float64) ** -1.3
    assert eigenvalues.tolist() == pytest.approx((2 * 2.0 * law / law.sum()).tolist(), rel=1e-4)
    off_diagonal = hessian - hessian.diag().diag()
    assert off_diagonal.norm() > 0.3 * hessian.norm()
    assert loss(torch.zeros(24)) == pytest.approx(shape.floor)


def test_the_quadratic_starts_at_its_stated_excess() -> None:
    shape = QuadraticShape()
    fleet = fleet_of(64, shape)
    losses = fleet.evaluate(torch.zeros(64, shape.rows, shape.columns))
    assert losses.mean() == pytest.approx(shape.floor + shape.excess, rel=0.1)


@pytest.mark.parametrize(("share", "examples"), [(1.0, 8), (0.25, 2)])
def test_the_noise_of_a_batch_is_that_of_its_examples_and_proportional_to_the_curvature(share, examples) -> None:
    shape, steps = QuadraticShape(rows=4, columns=6), 4000
    task = sample_tasks(np.random.default_rng(0), 1, model="quadratic")
    task.batch[0] = share
    displacement, held_out = shape.data(task, steps, BatchShape(sequences=8), None)
    theta = torch.zeros(steps, 4, 6, requires_grad=True)
    losses = shape.losses({"theta": theta}, displacement)
    assert losses.mean().item() == pytest.approx(shape.floor + shape.noise / examples, rel=0.05)
    gradients = torch.autograd.grad(losses.sum(), theta)[0].flatten(1).double()
    covariance = gradients.T @ gradients / steps

    def loss(theta: torch.Tensor) -> torch.Tensor:
        return shape.losses({"theta": theta.view(1, 4, 6)}, torch.zeros(1, 4, 6)).sum()

    hessian = torch.autograd.functional.hessian(loss, torch.zeros(24)).double()
    expected = 2.0 * shape.noise / (examples * 24) * hessian
    assert (covariance - expected).norm() < 0.1 * expected.norm()
    assert not held_out.any()


# -- the catalogue -----------------------------------------------------------------------------------


def test_the_catalogue_holds_every_model_of_the_tasks() -> None:
    assert tuple(FAMILIES) == MODELS == tuple(SHAPES)
    for name, shape in FAMILIES.items():
        assert family(name) is shape
        assert shape.name == name
        assert hash(shape) == hash(type(shape)() if name != "qwen2" else FleetShape(qkv_bias=True))
    with pytest.raises(ValueError, match="accepted: llama, qwen2, ngram, quadratic, lora"):
        family("gpt")


@pytest.mark.parametrize("name", SHAPES)
def test_matrices_come_first_and_the_draw_fills_every_parameter(name: str) -> None:
    shape = SHAPES[name]
    dimensions = [len(s) for _, s in shape.parameters()]
    assert dimensions == sorted(dimensions, reverse=True)
    fleet = fleet_of(2, shape)
    assert shape.draw(np.random.default_rng(0)).shape == (fleet.size,)
    assert not fleet.weights[:, fleet.size :].any()
    scaled = fleet_of(2, shape)
    scaled.reset([1], [np.random.default_rng([0, 1])], np.array([2.0]))
    assert torch.equal(scaled.weights[0], fleet.weights[0])
    assert torch.equal(scaled.weights[1, : fleet.matrices], 2.0 * fleet.weights[1, : fleet.matrices])
    assert torch.equal(scaled.weights[1, fleet.matrices :], fleet.weights[1, fleet.matrices :])
