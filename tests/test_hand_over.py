"""Handing over to SGD in a governed run: recorded, resumed, rolled back, and let go of when anything is odd."""

import contextlib
import copy
import functools
import math

import numpy as np
import pytest
import torch
from conftest import OPTIMIZERS
from governed_runs import same_bits
from hand_over_runs import (
    KNOWN,
    PERMITTED,
    Asks,
    backward,
    bits,
    decisions,
    make_model,
    train,
)
from torch.utils._python_dispatch import TorchDispatchMode

from lbw_rl import Action, Authority, Directive, Governor, Telemetry
from lbw_rl.action import NEUTRAL
from lbw_rl.replay import replay


def test_the_ledger_tells_of_it_and_a_replay_repeats_it(tmp_path):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    asks = Asks(lambda step: step >= KNOWN)
    with Governor(optimizer, asks, authority=PERMITTED, ledger=tmp_path / "l.jsonl") as governor:
        train(model, optimizer, KNOWN + 4)
    summary, records = governor.summary(), decisions(tmp_path / "l.jsonl")
    assert (summary["hand_overs"], summary["interventions"]) == (4, 4)
    for record in records[KNOWN:]:
        assert record["proposed"]["hand_over"] is record["executed"]["hand_over"] is True
        assert record["sgd_rate"] == records[KNOWN]["sgd_rate"] > 0  # it stands still
    assert all("hand_over" not in r["executed"] for r in records[:KNOWN])
    again = replay(tmp_path / "l.jsonl", Asks(lambda step: step >= KNOWN))
    assert (again.differing, again.faults) == (0, 0)
    otherwise = replay(tmp_path / "l.jsonl", Asks(lambda step: step >= KNOWN + 2))
    assert [(p["first"], p["last"], p["hand_over"]) for p in otherwise.passages] == [(KNOWN, KNOWN + 1, False)]


def test_the_loss_does_not_jump_at_the_hand_over_and_falls_on():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    governor = Governor(optimizer, Asks(lambda step: step >= 200), authority=PERMITTED)
    for step in range(600):
        losses.append(float(backward(model, step).detach()))
        optimizer.step()
    assert governor.summary()["hand_overs"] >= 390
    before, after, end = (sum(losses[a : a + 50]) / 50 for a in (150, 200, 550))
    assert after < 1.1 * before
    assert end < 0.8 * before


@pytest.mark.parametrize("saved_at", [30, KNOWN + 5, KNOWN + 12], ids=["measuring", "handed-over", "let-go"])
@pytest.mark.parametrize("late", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(saved_at, late):
    def begin():
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        asks = Asks(lambda step: KNOWN <= step < KNOWN + 10 or step > KNOWN + 15)
        options = {"authority": PERMITTED, "measure_device": False, "late": late}
        return model, optimizer, Governor(optimizer, asks, **options)

    model, optimizer, governor = begin()
    train(model, optimizer, KNOWN + 25)
    assert governor.summary()["hand_overs"] == (18 if late else 19)  # late telemetry counts one step less
    resumed = begin()
    train(*resumed[:2], saved_at)
    states = [copy.deepcopy(part.state_dict()) for part in resumed]
    resumed = begin()
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    train(*resumed[:2], KNOWN + 25 - saved_at, start=saved_at)
    assert same_bits(bits(model, optimizer), bits(*resumed[:2]))
    assert resumed[2].state_dict()["recorder"] == governor.state_dict()["recorder"]


def test_a_state_of_wider_authority_does_not_hand_over_here():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    governor = Governor(optimizer, Asks(), authority=PERMITTED)
    train(model, optimizer, KNOWN)
    state = copy.deepcopy(governor.state_dict())
    assert state["held"]["hand_over"] is True
    governor.close()
    narrow = Governor(optimizer, Asks())
    narrow.load_state_dict(state)
    assert "hand_over" not in narrow.state_dict()["held"]


def test_a_rollback_goes_back_to_before_the_hand_over_with_rate_and_moments():
    """Kept at the last decision of Adam, gone on with as SGD, rolled back: as if those steps had not been."""
    back_at = KNOWN + 6

    class Back(Asks):
        def act(self, telemetry):
            directive = Directive.ROLLBACK if telemetry.step == back_at else Directive.PROCEED
            handed_over = KNOWN <= telemetry.step < back_at
            regime = "elsewhere" if handed_over or telemetry.step < KNOWN - 1 else "steady"
            return Action(hand_over=handed_over, directive=directive, regime=regime)

    authority = Authority(hand_over=True, max_rollbacks=1, snapshot_every=1)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    governor = Governor(optimizer, Back(), authority=authority)
    train(model, optimizer, KNOWN - 1)
    before = bits(model, optimizer)
    train(model, optimizer, 1, start=KNOWN - 1)
    assert governor._last_good.step == KNOWN - 1
    rate = copy.deepcopy(governor._last_good.snapshot._others["sgd_rate"])
    train(model, optimizer, 6, start=KNOWN)
    assert governor.summary()["hand_overs"] == 6
    assert governor._sgd_rate.state_dict() != rate  # one more Adam step has been measured since
    train(model, optimizer, 1, start=back_at)
    assert governor.summary()["rollbacks"] == 1
    assert governor.summary()["faults"] == {}
    assert same_bits(bits(model, optimizer), before)
    assert governor._sgd_rate.state_dict() == rate


@pytest.mark.parametrize("kind", ["adamw-foreach", "adamw-fused"])
@pytest.mark.parametrize("late", [False, True])
def test_a_hostile_controller_that_flips_at_every_step_keeps_finite_weights(kind, late):
    rng = np.random.default_rng(0)

    class Flips(Asks):
        def act(self, telemetry):
            return Action(
                hand_over=bool(rng.integers(2)),
                lr_scale=float(rng.choice([1e-9, 1.0, 1e9])),
                momentum_scale=float(rng.choice([1e-9, 1.0, 1e9])),
            )

    model = make_model()
    optimizer = OPTIMIZERS[kind](model.parameters())
    governor = Governor(optimizer, Flips(), authority=Authority(hand_over=True), late=late)
    before = [copy.deepcopy({k: v for k, v in g.items() if k != "params"}) for g in optimizer.param_groups]
    for step in range(300):
        backward(model, step)
        if step % 50 == 49:
            model[0].weight.grad[0, 0] = math.nan if late else 1e3
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in model.parameters()), step
    assert governor.summary()["hand_overs"] > 30
    assert governor.summary()["faults"] == {}
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == before


@pytest.mark.parametrize("size", [1e3, 1e12, 1e20], ids=["thousand", "huge", "norm overflows"])
def test_a_burst_in_the_sgd_phase_is_left_to_adam_which_hardly_feels_it(size):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    governor = Governor(optimizer, Asks(), authority=PERMITTED)
    train(model, optimizer, KNOWN)
    assert governor.executed.hand_over
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(KNOWN, KNOWN + 20):
        backward(model, step)
        if step == KNOWN:
            model[0].weight.grad.mul_(size)
        optimizer.step()
        assert not governor.executed.hand_over
        if step == KNOWN:
            assert "times those that the SGD rate was measured at" in governor.last_ruling.reasons[0]
    assert all(
        float((p.detach() - w).abs().max()) < 20 * 4 * 3e-3 for p, w in zip(model.parameters(), before, strict=True)
    )


@pytest.mark.parametrize("kind", ["adamw-foreach", "adamw-fused"])
def test_a_handed_over_step_makes_no_host_wait_and_withholds_poison_on_the_device(kind):
    class HostReads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            assert name not in {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal"}, name
            return func(*args, **(kwargs or {}))

    model = make_model()
    optimizer = OPTIMIZERS[kind](model.parameters())
    governor = Governor(optimizer, Asks(), authority=PERMITTED, late=True)
    train(model, optimizer, KNOWN)
    assert governor.executed.hand_over
    for step in range(KNOWN, KNOWN + 8):
        backward(model, step)
        if step == KNOWN + 3:
            model[0].weight.grad[0, 0] = math.nan
        # The step after the poison is Adam's, whose foreach kernel reads its own counters on the host.
        with contextlib.nullcontext() if step == KNOWN + 4 else HostReads():
            optimizer.step()
        assert governor.executed.hand_over == (step != KNOWN + 4)
        assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert governor.summary()["skips"] == 1
    assert governor.summary()["faults"] == {}


def test_steps_with_a_closure_move_once(make_mlp):
    """As Lightning makes them; the closure's own result is returned, its gradients are left in place."""
    runs = []
    for closures in (False, True):
        model = make_mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        governor = Governor(optimizer, Asks(lambda step: step >= KNOWN), authority=PERMITTED)
        for step in range(KNOWN + 5):
            if closures:
                optimizer.step(functools.partial(backward, model, step))
            else:
                backward(model, step)
                optimizer.step()
        assert governor.summary()["hand_overs"] == 5
        assert all(p.grad is not None for p in model.parameters())
        runs.append(bits(model, optimizer))
    assert same_bits(*runs)


def test_a_closure_that_is_called_again_after_the_update_moves_nothing_more():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    governor = Governor(optimizer, Asks(lambda step: step >= KNOWN), authority=PERMITTED)
    train(model, optimizer, KNOWN)
    moved = []

    def twice(closure):
        closure()
        moved.extend(p.detach().clone() for p in model.parameters())
        return closure()

    optimizer.register_step_pre_hook(lambda _, args, kwargs: ((args[0], lambda: twice(args[1])), kwargs))
    optimizer.step(lambda: backward(model, KNOWN))
    assert governor.summary()["hand_overs"] == 1
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), moved, strict=True))
    assert all(p.grad is not None for p in model.parameters())


def test_a_hook_that_raises_after_the_update_leaves_gradients_and_rates_in_place():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    Governor(optimizer, Asks(lambda step: step >= KNOWN, lr_scale=0.5), authority=PERMITTED)
    train(model, optimizer, KNOWN)

    def raises(*_):
        raise RuntimeError("a hook of someone else's")

    backward(model, KNOWN)
    handle = optimizer.register_step_pre_hook(raises)
    with pytest.raises(RuntimeError, match="someone else"):
        optimizer.step()
    handle.remove()
    moved = [p.detach().clone() for p in model.parameters()]
    assert all(p.grad is not None for p in model.parameters())
    assert optimizer.param_groups[0]["lr"] == 3e-3
    optimizer.zero_grad()
    optimizer.step()  # nothing to follow, nothing moves
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), moved, strict=True))


def test_a_suspended_controller_leaves_the_run_to_adam_with_its_moments():
    class Breaks(Asks):
        def act(self, telemetry):
            if telemetry.step >= KNOWN + 5:
                raise RuntimeError("broken")
            return super().act(telemetry)

    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    controller = Breaks(lambda step: step >= KNOWN)
    governor = Governor(optimizer, controller, authority=Authority(hand_over=True, suspend_after=1))
    train(model, optimizer, KNOWN + 5)
    plain = make_model()
    plain.load_state_dict(model.state_dict())
    twin = torch.optim.AdamW(plain.parameters(), lr=3e-3)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(int(s["step"]) == KNOWN + 5 for s in twin.state.values())
    for m, o in ((model, optimizer), (plain, twin)):
        train(m, o, 10, start=KNOWN + 5)
    assert governor.summary()["suspended"]
    assert governor.executed.hand_over is False
    assert same_bits(bits(model, optimizer), bits(plain, twin))


def test_autocast_with_a_grad_scaler_hands_over_where_gradients_come_unscaled():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    governor = Governor(optimizer, Asks(), authority=PERMITTED, stateful={"scaler": scaler})
    for step in range(KNOWN):
        model.zero_grad()
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        scaler.scale((model(x) - x[:, :3]).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert governor.summary()["hand_overs"] > 0
    fused = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    governor = Governor(fused, Asks(), authority=PERMITTED, stateful={"scaler": scaler})
    for step in range(KNOWN):
        model.zero_grad()
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        scaler.scale((model(x) - x[:, :3]).square().mean()).backward()
        scaler.step(fused)
        scaler.update()
    assert governor.summary()["hand_overs"] == 0
    assert governor.last_ruling.reasons == ("hand-over denied: a GradScaler leaves unscaling to the fused optimizer",)


def test_the_neutral_action_asks_for_nothing():
    assert NEUTRAL.hand_over is False
    assert math.isnan(Telemetry().sgd_rate)
