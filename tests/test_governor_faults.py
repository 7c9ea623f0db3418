"""Fail-open: what breaks in governance, or in the step itself, costs its part and never the run."""

import math
from pathlib import Path

import pytest
import torch
from governed_runs import WIDE, Scripted, bits, executed_rates, same_bits, train_mlp

from lbw_rl import Action, Authority, Governor


def test_a_broken_controller_is_reported_once_suspended_and_the_run_goes_on(make_mlp, caplog):
    model, plain = make_mlp(), make_mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    controller = Scripted(repeat=ValueError("on fire"))
    governor = Governor(optimizer, controller, authority=Authority(suspend_after=3))
    train_mlp(model, optimizer, governor)
    train_mlp(plain, torch.optim.AdamW(plain.parameters()))
    assert same_bits(bits(model), bits(plain))
    summary = governor.summary()
    assert summary["suspended"]
    assert summary["faults"] == {"controller": 3}
    assert summary["regimes"] == {"fault": 3, "suspended": 7}
    assert len(controller.seen) == 3  # asked no more
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "ValueError: on fire" in caplog.text


@pytest.mark.parametrize("method", ["pack", "before_step", "after_step"])
def test_a_broken_probe_costs_its_signals_and_no_more(method, make_mlp, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such tensor")

    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    governor = Governor(optimizer, Scripted(repeat=Action(lr_scale=0.5)))
    monkeypatch.setattr(governor._measurement.probe, method, broken)
    rates = executed_rates(optimizer)
    train_mlp(model, optimizer, governor, steps=5)
    assert rates == [0.005] * 5  # control goes on
    assert governor.summary()["faults"] == {"probe": 5}
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_a_broken_device_costs_its_signals_and_no_more(make_mlp, monkeypatch):
    def broken():
        raise OSError("/proc is not mounted")

    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    controller = Scripted()
    governor = Governor(optimizer, controller)
    monkeypatch.setattr(governor._measurement._device, "read", broken)
    train_mlp(model, optimizer, governor, steps=3)
    assert governor.summary()["faults"] == {"device": 3}
    assert math.isnan(controller.seen[-1].cpu_utilization)
    assert math.isfinite(controller.seen[-1].loss)


def test_a_ledger_that_cannot_be_opened_does_not_stop_the_run(make_mlp, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "ledger.jsonl"):
        model = make_mlp()
        optimizer = torch.optim.AdamW(model.parameters())
        with Governor(optimizer, "lbw-guard", ledger=path) as governor:
            train_mlp(model, optimizer, governor, steps=3)
        assert governor.summary()["faults"] == {"ledger": 1}
        assert governor.summary()["decisions"] == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_does_not_stop_the_run_nor_its_end(make_mlp, caplog):
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    governor = Governor(optimizer, "lbw-guard", ledger="/dev/full")
    train_mlp(model, optimizer, governor, steps=3)
    governor.close()
    assert governor.summary()["faults"]["ledger"] >= 3
    assert governor.summary()["decisions"] == 3
    assert caplog.text.count("No space left") == 1


@pytest.mark.parametrize("evidence", [{"x": object()}, {("a", "b"): 1.0}], ids=["value", "key"])
def test_evidence_that_is_no_json_costs_its_ledger_line_alone(make_mlp, tmp_path, evidence):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    action = Action(lr_scale=0.5, evidence=evidence)
    governor = Governor(optimizer, Scripted(repeat=action), ledger=tmp_path / "ledger.jsonl")
    rates = executed_rates(optimizer)
    train_mlp(model, optimizer, governor, steps=2)
    assert rates == [0.05] * 2
    assert governor.summary()["faults"] == {"ledger": 2}


def test_a_fault_of_governance_itself_lets_go_no_faster_than_the_slew_limit(make_mlp, monkeypatch):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    authority = Authority(lr_scale=(0.01, 1.0), slew_up=2.0)
    governor = Governor(optimizer, Scripted(repeat=Action(lr_scale=0.1)), authority=authority)
    rates = executed_rates(optimizer)
    train_mlp(model, optimizer, governor, steps=2)
    monkeypatch.setattr(governor, "_take", lambda: 1 / 0)
    train_mlp(model, optimizer, governor, steps=5)
    assert rates == pytest.approx([0.1, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    assert governor.summary()["faults"] == {"governor": 5}


class Nested(torch.optim.SGD):
    """A subclass whose `step` wraps its parent's: torch runs the step hooks for both."""

    fails = False

    def step(self, closure=None):
        self.within = [self.param_groups[0]["lr"]]
        super().step(closure)
        if self.fails:
            raise RuntimeError("out of memory")
        self.within.append(self.param_groups[0]["lr"])


def test_a_step_within_a_step_is_one_step(make_mlp):
    model, plain = make_mlp(), make_mlp()
    torch.optim.SGD(plain.parameters())  # from now on torch hooks the parent class as well
    optimizer = Nested(model.parameters(), lr=0.1)
    controller = Scripted(*[Action(lr_scale=1 / (2 + i)) for i in range(5)])
    governor = Governor(optimizer, controller, authority=WIDE)
    for step in range(5):
        train_mlp(model, optimizer, governor, steps=1, start=step)
        assert optimizer.within == pytest.approx([0.1 / (2 + step)] * 2)
        assert optimizer.param_groups[0]["lr"] == 0.1
    assert [t.step for t in controller.seen] == [0, 1, 2, 3, 4]
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        train_mlp(model, optimizer, governor, steps=1)
    optimizer.fails = False
    train_mlp(model, optimizer, governor, steps=2)
    assert [t.step for t in controller.seen] == [0, 1, 2, 3, 4, 5, 5, 6]
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_step_that_raises_is_restored_at_the_next(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    controller = Scripted(repeat=Action(lr_scale=0.5, momentum_scale=2.0))
    governor = Governor(optimizer, controller, authority=WIDE)
    rates = executed_rates(optimizer)
    failing = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            train_mlp(model, optimizer, governor, steps=1)
    failing.remove()
    train_mlp(model, optimizer, governor, steps=2)
    assert rates == [0.05] * 4
    assert [t.learning_rate for t in controller.seen] == [0.1] * 4
    assert [t.step for t in controller.seen] == [0, 0, 0, 1]
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.1, 0.9)
