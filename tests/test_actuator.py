"""The actuator writes base × scale for one step and puts back every bit, whatever the optimizer."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lbw_rl import Action, Directive
from lbw_rl.actuator import Actuator, scaled_decay


def backward(model, seed=0):
    model.zero_grad()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()


def hyperparameters(optimizer):
    return [
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in g.items() if k != "params"}
        for g in optimizer.param_groups
    ]


def state_of(model, optimizer):
    """A deep copy of weights, gradients and optimizer state."""
    return copy.deepcopy(
        (list(model.parameters()), [p.grad for p in model.parameters()], optimizer.state_dict()["state"])
    )


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# ---- momentum as an averaging horizon


def test_scale_two_doubles_the_averaging_horizon():
    assert scaled_decay(0.9, 2.0) == pytest.approx(0.95)
    assert scaled_decay(0.9, 0.5) == pytest.approx(0.8)
    assert scaled_decay(0.9, 0.05) == 0.0  # half a step is no memory
    assert scaled_decay(0.9, 1.0) == 0.9
    assert scaled_decay(0.0, 2.0) == 0.0


@given(st.floats(0, 1, exclude_max=True), st.floats(1e-6, 1e300))
def test_a_scaled_decay_never_reaches_one(decay, scale):
    assert 0 <= scaled_decay(decay, scale) < 1


@given(st.floats(0.1, 0.999), st.floats(0.01, 100))
def test_the_horizon_is_multiplied_by_the_scale_down_to_one_step(decay, scale):
    horizon = 1 / (1 - scaled_decay(decay, scale))
    assert horizon == pytest.approx(max(1.0, scale / (1 - decay)), rel=1e-6)


# ---- writing and restoring


@given(st.floats(1e-3, 1e3), st.floats(0.1, 10))
def test_apply_then_restore_leaves_every_bit(lr_scale, momentum_scale):
    p = [torch.nn.Parameter(torch.zeros(2))]
    for optimizer in (
        torch.optim.AdamW(p, lr=0.1 + 0.2),
        torch.optim.AdamW(p, lr=torch.tensor(0.3)),
        torch.optim.SGD(p, lr=1 / 3, momentum=0.9),
        torch.optim.Adagrad(p),
    ):
        actuator, before = Actuator(optimizer), hyperparameters(optimizer)
        actuator.apply(Action(lr_scale=lr_scale, momentum_scale=momentum_scale))
        if lr_scale != 1:
            assert hyperparameters(optimizer) != before
        actuator.restore()
        assert hyperparameters(optimizer) == before


def test_what_is_written_is_base_times_scale(make_mlp):
    optimizer = torch.optim.AdamW(make_mlp().parameters(), lr=0.01, betas=(0.9, 0.99))
    actuator = Actuator(optimizer)
    for _ in range(3):  # applying again does not compound
        actuator.apply(Action(lr_scale=4.0, momentum_scale=2.0))
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.04
    assert group["betas"] == (pytest.approx(0.95), 0.99)


def test_sgd_momentum_is_scaled_and_no_momentum_stays_none(make_mlp):
    heavy = torch.optim.SGD(make_mlp().parameters(), lr=0.1, momentum=0.9)
    light = torch.optim.SGD(make_mlp().parameters(), lr=0.1)
    for optimizer in (heavy, light):
        Actuator(optimizer).apply(Action(momentum_scale=2.0))
    assert heavy.param_groups[0]["momentum"] == pytest.approx(0.95)
    assert light.param_groups[0]["momentum"] == 0


def test_a_tensor_learning_rate_is_changed_in_place_and_restored_bit_for_bit(make_mlp):
    lr = torch.tensor(1 / 3)
    optimizer = torch.optim.AdamW(make_mlp().parameters(), lr=lr)
    actuator = Actuator(optimizer)
    actuator.apply(Action(lr_scale=0.7))
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.7 / 3)
    actuator.restore()
    assert optimizer.param_groups[0]["lr"] is lr
    assert torch.equal(lr, torch.tensor(1 / 3))


def test_several_groups_keep_their_ratio(make_mlp):
    first, second = make_mlp(), make_mlp()
    optimizer = torch.optim.AdamW(
        [{"params": first.parameters(), "lr": 0.1}, {"params": second.parameters(), "betas": (0.5, 0.9)}], lr=0.003
    )
    actuator = Actuator(optimizer)
    actuator.apply(Action(lr_scale=0.25, momentum_scale=2.0))
    assert [g["lr"] for g in optimizer.param_groups] == [0.025, 0.00075]
    assert [g["betas"] for g in optimizer.param_groups] == [(pytest.approx(0.95), 0.999), (0.75, 0.9)]
    actuator.restore()
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.003]


def test_a_neutral_action_writes_nothing(make_mlp):
    class Guarded(dict):
        def __setitem__(self, key, value):
            raise AssertionError(f"{key} was written")

    optimizer = torch.optim.AdamW(make_mlp().parameters())
    optimizer.param_groups[0] = Guarded(optimizer.param_groups[0])
    actuator = Actuator(optimizer)
    actuator.apply(Action())
    actuator.restore()


# ---- skipping


def test_a_skipped_step_moves_nothing_in_any_optimizer(make_optimizer, make_mlp):
    model = make_mlp()
    optimizer = make_optimizer(model.parameters())
    actuator = Actuator(optimizer)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    before, gradients = state_of(model, optimizer), [p.grad for p in model.parameters()]
    actuator.apply(Action(lr_scale=2.0, momentum_scale=0.5, directive=Directive.SKIP))
    optimizer.step()
    actuator.restore()
    assert equal(state_of(model, optimizer), before)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


def test_a_scaled_step_equals_a_step_at_the_scaled_rate_in_any_optimizer(make_optimizer, make_mlp):
    scaled, reference = make_mlp(), make_mlp()
    governed, plain = make_optimizer(scaled.parameters()), make_optimizer(reference.parameters())
    actuator = Actuator(governed)
    for group in plain.param_groups:
        group["lr"] = group["lr"] * 0.5
    for step in range(3):
        for model in (scaled, reference):
            backward(model, step)
        actuator.apply(Action(lr_scale=0.5))
        governed.step()
        actuator.restore()
        plain.step()
    assert equal(list(scaled.parameters()), list(reference.parameters()))


# ---- a step that raises


def test_a_step_that_raised_is_restored_by_the_next_apply(make_mlp):
    optimizer = torch.optim.SGD(make_mlp().parameters(), lr=0.1, momentum=0.9)
    actuator = Actuator(optimizer)
    actuator.apply(Action(lr_scale=10.0, momentum_scale=2.0))  # and restore never came
    actuator.apply(Action(lr_scale=0.5))
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_gradients_that_came_after_a_skip_was_cut_short_stand(make_mlp):
    model = make_mlp()
    actuator = Actuator(torch.optim.SGD(model.parameters(), lr=0.1))
    backward(model, 0)
    actuator.apply(Action(directive=Directive.SKIP))
    backward(model, 1)
    newer = [p.grad for p in model.parameters()]
    actuator.restore()
    assert all(p.grad is g for p, g in zip(model.parameters(), newer, strict=True))
    assert all(math.isfinite(g.sum()) for g in newer)
