"""The last good state: put back bit for bit, within its byte budget, and part of a checkpoint."""

import copy

import pytest
import torch

from lbw_rl.snapshot import Snapshot


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()


def owned(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))


def assert_equal(a, b):
    weights, state = a
    assert all(torch.equal(weights[k], b[0][k]) for k in weights)
    assert state.keys() == b[1].keys()
    for p in state:
        assert state[p].keys() == b[1][p].keys()
        for key, value in state[p].items():
            other = b[1][p][key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


@pytest.mark.parametrize("good", [0, 3], ids=["before-the-first-step", "in-mid-run"])
def test_restore_is_bitwise_and_the_run_replays_from_there(make_optimizer, make_mlp, good):
    model = make_mlp()
    optimizer = make_optimizer(model.parameters())
    snapshot = Snapshot(optimizer, byte_budget=1 << 20)
    train(model, optimizer, range(good))
    before = owned(model, optimizer)
    assert snapshot.take(good)
    train(model, optimizer, range(10, 13))
    lived_through = owned(model, optimizer)
    for _ in range(2):  # a snapshot can be restored again
        snapshot.restore()
        assert_equal(owned(model, optimizer), before)
        train(model, optimizer, range(10, 13))
        assert_equal(owned(model, optimizer), lived_through)


def test_the_optimizer_keeps_its_own_tensors(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(1))
    tensors = [v for s in optimizer.state.values() for v in s.values()]
    snapshot = Snapshot(optimizer, byte_budget=1 << 20)
    snapshot.take(1)
    train(model, optimizer, range(1, 3))
    snapshot.restore()
    assert all(a is b for a, b in zip(tensors, (v for s in optimizer.state.values() for v in s.values()), strict=True))


def test_what_the_optimizer_took_up_since_is_dropped(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(1))
    snapshot = Snapshot(optimizer, byte_budget=1 << 20)
    snapshot.take(1)
    before = owned(model, optimizer)
    for state in optimizer.state.values():
        state["restarts"] = 3
    snapshot.restore()
    assert_equal(owned(model, optimizer), before)


def test_a_state_over_budget_is_not_copied(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    size = 4 * sum(p.numel() for p in model.parameters())
    assert Snapshot(optimizer, size).bytes_needed() == size
    assert Snapshot(optimizer, size).take(0)
    too_small = Snapshot(optimizer, size - 1)
    assert not too_small.take(0)
    with pytest.raises(RuntimeError, match="no snapshot"):
        too_small.restore()


def test_state_round_trip_through_a_checkpoint(make_mlp, tmp_path):
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, range(2))
    original, restored = Snapshot(optimizer, 1 << 20), Snapshot(optimizer, 1 << 20)
    original.take(2)
    before = owned(model, optimizer)
    torch.save(original.state_dict(), tmp_path / "snapshot.pt")
    train(model, optimizer, range(2, 4))
    restored.load_state_dict(torch.load(tmp_path / "snapshot.pt", weights_only=True))
    assert restored.step == 2
    restored.restore()
    assert_equal(owned(model, optimizer), before)
