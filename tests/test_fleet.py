"""What holds for a fleet of every family: its models are independent, reproducible, and start over one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from one_model import SHAPES, batches_for, fleet_of

from lbw_rl.envs.fleet import _GROUP, Fleet

every_family = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def settings(n: int, lr: float = 1e-2) -> tuple[np.ndarray, ...]:
    return np.full(n, lr), np.full(n, 0.9), np.full(n, 0.99)


@every_family
def test_reset_leaves_the_others_bitwise_alone(shape) -> None:
    batches = batches_for(4, 8, shape)
    with_reset, without = fleet_of(4, shape), fleet_of(4, shape)
    for t in range(8):
        for fleet in (with_reset, without):
            fleet.backward(batches[t])
            fleet.step(*settings(4), weight_decay=0.1)
        if t == 3:
            with_reset.reset([1], [np.random.default_rng(9)])
    others = [0, 2, 3]
    assert torch.equal(with_reset.weights[others], without.weights[others])
    assert torch.equal(with_reset.optimizer.square[others], without.optimizer.square[others])
    assert not torch.equal(with_reset.weights[1], without.weights[1])
    assert with_reset.optimizer.steps.tolist() == [8, 4, 8, 8]


@every_family
def test_same_seed_same_bits_and_equal_rows_stay_equal(shape) -> None:
    """A model's bits depend neither on its place in the fleet nor on its neighbours."""
    n = _GROUP + 3  # two groups, the second one not full
    a, b = fleet_of(n, shape), fleet_of(n, shape)
    batches = batches_for(n, 6, shape)
    for fleet in (a, b):
        fleet.weights[[4, n - 1]] = fleet.weights[0].clone()
    batches[:, [4, n - 1]] = batches[:, [0]]
    for t in range(6):
        for fleet in (a, b):
            fleet.backward(batches[t])
            fleet.step(*settings(n, 3e-2))
    assert torch.equal(a.weights, b.weights)
    assert torch.equal(a.weights[0], a.weights[4])
    assert torch.equal(a.weights[0], a.weights[n - 1])


@every_family
def test_a_large_fleet_is_its_models_one_by_one(shape) -> None:
    n = 2 * _GROUP + 1
    fleet, batch = fleet_of(n, shape), batches_for(n, 1, shape)[0]
    losses = fleet.backward(batch)
    fleet.step(*settings(n), weight_decay=0.1, clip=np.full(n, 0.5))
    assert losses.shape == fleet.evaluate(batch).shape == (n,)
    for i in (0, _GROUP - 1, _GROUP, n - 1):
        alone = Fleet(1, shape)
        alone.reset([0], [np.random.default_rng([0, i])])
        assert alone.backward(batch[i : i + 1])[0] == pytest.approx(losses[i], rel=1e-6)
        alone.step(*settings(1), weight_decay=0.1, clip=np.full(1, 0.5))
        assert torch.allclose(alone.weights[0], fleet.weights[i], atol=1e-6)


@every_family
def test_copy_and_paste_grads_continue_the_models(shape) -> None:
    fleet, batches = fleet_of(4, shape), batches_for(4, 2, shape)
    fleet.backward(batches[0])
    fleet.step(*settings(4))
    part = fleet.copy([2, 0])
    assert np.allclose(part.backward(batches[1][[2, 0]]), fleet.backward(batches[1])[[2, 0]], rtol=1e-6)
    before = fleet.grads.clone()
    fleet.paste_grads([2, 0], part)
    assert torch.allclose(fleet.grads, before, atol=1e-6)


@every_family
def test_a_broken_model_does_not_spread(shape) -> None:
    fleet, batches = fleet_of(3, shape), batches_for(3, 3, shape)
    fleet.weights[1, : fleet.size] = float("nan")
    for t in range(3):
        losses = fleet.backward(batches[t])
        fleet.step(*settings(3), clip=np.full(3, 1.0))
    assert np.isfinite(losses).tolist() == [True, False, True]
    assert fleet.weights[[0, 2]].isfinite().all()


@every_family
def test_padding_stays_empty(shape) -> None:
    fleet, batches = fleet_of(2, shape), batches_for(2, 2, shape)
    for batch in batches:
        fleet.backward(batch)
        fleet.step(*settings(2), weight_decay=0.1)
    assert not fleet.weights[:, fleet.size :].any()
    assert [name for name, _ in fleet.named_parameters()] == [name for name, _ in shape.parameters()]
