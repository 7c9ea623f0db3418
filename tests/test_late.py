"""Deciding on the values of the decision before, so that an accelerator is never waited for; tried here on the CPU."""

import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lbw_rl import Action, Authority, Controller, Directive, Governor
from lbw_rl.signals import SIGNALS
from lbw_rl.transfer import Transfer

KNOWN_AT_ONCE = {"step", "progress", "learning_rate", "momentum", "lr_scale", "momentum_scale"}


class Records(Controller):
    """Keeps what it sees; skips where it sees what is not finite."""

    name = "records"

    def __init__(self, scale=1.0):
        self.scale = scale

    def reset(self, context):
        self.seen = []

    def act(self, telemetry):
        self.seen.append(telemetry.as_dict())
        return Action(lr_scale=self.scale, directive=Directive.SKIP if telemetry.nonfinite == 1 else Directive.PROCEED)


def train(model, optimizer, governor, steps, poison=()):
    before = None
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().mean()
        loss.backward()
        if step in poison:
            model[0].weight.grad[0, 0] = math.nan
            before = state(model, optimizer)
        if governor is not None:
            governor.observe(loss)
        optimizer.step()
        if step in poison:
            yield before, state(model, optimizer)


def state(model, optimizer):
    moments = [v.clone() for s in optimizer.state.values() for v in s.values()]
    return [p.detach().clone() for p in model.parameters()], moments


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("decide_every", [1, 3])
def test_late_telemetry_is_that_of_the_decision_before(make_mlp, decide_every):
    seen = []
    for late in (False, True):
        model = make_mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        controller = Records()
        governor = Governor(
            optimizer, controller, total_steps=12, late=late, decide_every=decide_every, measure_device=False
        )
        list(train(model, optimizer, governor, 12))
        assert governor.summary()["faults"] == {}
        seen.append(controller.seen)
    on_time, late = seen
    assert all(math.isnan(late[0][name]) for name in set(SIGNALS) - KNOWN_AT_ONCE)
    for a, b in zip(on_time, late[1:], strict=False):
        assert a == pytest.approx(b, nan_ok=True)


class HostReads(TorchDispatchMode):
    """Refuses every operation that would make the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero"}:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def test_no_decision_reads_a_tensor_but_those_of_the_decision_before(make_mlp, monkeypatch):
    """Every way from a tensor to the host is closed, except `Transfer.result`, and that one opens a decision later."""
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2), fused=True)
    governor = Governor(optimizer, "lbw-guard", total_steps=12, late=True, decide_every=2, model=model)
    for module in ("governor", "leading_group", "sgd_rate"):
        monkeypatch.setattr(
            f"lbw_rl.{module}.rate_on_host", lambda group: math.nan
        )  # on a device the rate comes with the rest
    allowed, age = [False], {}

    def guarded(name, original):
        def read(self, *args, **kwargs):
            assert allowed[0], f"Tensor.{name} in the hot path"
            return original(self, *args, **kwargs)

        return read

    result = Transfer.result

    def late_result(self):
        assert age[id(self)] < governor.step, "read within the decision that measured it"
        allowed[0] = True
        try:
            return result(self)
        finally:
            allowed[0] = False

    started = Transfer.__init__

    def start(self, values):
        started(self, values)
        age[id(self)] = governor.step

    monkeypatch.setattr(Transfer, "result", late_result)
    monkeypatch.setattr(Transfer, "__init__", start)
    for step in range(12):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().mean()
        loss.backward()
        with monkeypatch.context() as m, HostReads():
            for name in ("item", "tolist", "numpy", "cpu", "__float__", "__bool__", "__int__"):
                m.setattr(torch.Tensor, name, guarded(name, getattr(torch.Tensor, name)))
            governor.observe(loss)
            optimizer.step()
    assert governor.summary()["faults"] == {}  # a refusal would have been swallowed, and counted
    assert governor.summary()["decisions"] == 6
    assert governor.last_telemetry.update_ratio > 0


def test_a_poisoned_step_is_withheld_on_the_device_and_known_a_decision_later(make_mlp, tmp_path):
    """A fused optimizer is told through `found_inf`: no weight, no moment and no step count moves."""
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    governor = Governor(optimizer, Records(0.5), late=True, ledger=tmp_path / "l")
    (pair,) = train(model, optimizer, governor, 10, poison=[5])
    assert all(equal(a, b) for a, b in zip(*pair, strict=True))
    assert governor.summary()["skips"] == 1
    assert governor.summary()["faults"] == {}
    records = [json.loads(line) for line in (tmp_path / "l").read_text().splitlines()[1:]]
    assert [r["step"] for r in records if r.get("withheld_on_device")] == [6]
    assert "skip came late: the telemetry is that of an earlier step" in records[6]["reasons"]
    assert records[6]["executed"]["directive"] == "proceed"
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("kind", ["foreach", "plain", "sgd"])
def test_without_a_fused_optimizer_the_weights_are_spared_the_poison(make_mlp, kind):
    model = make_mlp()
    optimizer = (
        torch.optim.SGD(model.parameters(), lr=1e-2)
        if kind == "sgd"
        else torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=kind == "foreach")
    )
    governor = Governor(optimizer, "constant", late=True)
    (pair,) = train(model, optimizer, governor, 10, poison=[5])
    weights, moments = state(model, optimizer)
    assert all(t.isfinite().all() for t in (*weights, *moments))
    if kind == "sgd":
        assert equal(pair[0][0], pair[1][0])


def test_the_device_withholds_no_more_than_the_authority_allows(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    governor = Governor(optimizer, "constant", late=True, authority=Authority(max_skips=2, skip_window=100))
    pairs = list(train(model, optimizer, governor, 10, poison=[3, 5, 7]))
    assert [equal(before[0], after[0]) for before, after in pairs] == [True, True, False]


@pytest.mark.parametrize("mode", ["shadow", "off"])
def test_where_nothing_may_change_nothing_is_withheld(make_mlp, mode):
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    governor = Governor(optimizer, "constant", late=True, mode=mode)
    (pair,) = train(model, optimizer, governor, 6, poison=[5])
    assert not equal(pair[0][0], pair[1][0])


@pytest.mark.parametrize("late", [False, True])
def test_an_idle_governor_leaves_every_bit(make_mlp, late):
    runs = []
    for governed in (False, True):
        model = make_mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        governor = Governor(optimizer, "constant", late=late) if governed else None
        list(train(model, optimizer, governor, 20))
        runs.append(state(model, optimizer))
    assert all(equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_late_governor_resumes_with_the_values_that_were_on_their_way(make_mlp, tmp_path):
    def start():
        model = make_mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
        options = {"total_steps": 16, "late": True, "measure_device": False}
        authority = Authority(lr_scale=(1e-3, 100.0))
        return model, optimizer, Governor(optimizer, "lbw-guard", authority=authority, **options)

    def advance(model, optimizer, governor, steps):
        for step in steps:
            optimizer.zero_grad()
            loss = model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().mean()
            loss.backward()
            governor.observe(loss)
            optimizer.step()

    whole = start()
    advance(*whole, range(16))
    first = start()
    advance(*first, range(7))
    parts = {"model": first[0], "optimizer": first[1], "governor": first[2]}
    torch.save({k: v.state_dict() for k, v in parts.items()}, tmp_path / "c.pt")
    second = start()
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    for part, name in zip(second, ("model", "optimizer", "governor"), strict=True):
        part.load_state_dict(saved[name])
    advance(*second, range(7, 16))
    assert equal(state(*whole[:2])[0], state(*second[:2])[0])
    assert whole[2]._recorder.digest == second[2]._recorder.digest


def test_between_two_decisions_a_poisoned_step_is_withheld_on_its_own(make_mlp, tmp_path):
    """With decisions every five steps, a NaN at step 7 costs that step alone, and step 10 is not blamed for it."""
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    governor = Governor(optimizer, Records(0.5), decide_every=5, ledger=tmp_path / "l")
    (pair,) = train(model, optimizer, governor, 15, poison=[7])
    assert all(equal(a, b) for a, b in zip(*pair, strict=True))
    records = [json.loads(line) for line in (tmp_path / "l").read_text().splitlines()[1:]]
    assert [(r["type"], r["step"]) for r in records] == [
        ("decision", 0),
        ("decision", 5),
        ("skip", 7),
        ("decision", 10),
    ]
    assert records[-1]["telemetry"]["nonfinite"] == 0.0
    assert governor.summary()["skips"] == 1
