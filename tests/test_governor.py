"""The governor around real optimizers: idle it changes no bit, at work it stays in bounds, broken it lets the run go on."""

import copy
import io
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lbw_rl import Action, Authority, Controller, Directive, Governor, Telemetry, load_controller
from lbw_rl.action import NEUTRAL
from lbw_rl.ledger import read_ledger

STEPS = 50
WIDE = Authority(lr_scale=(1e-3, 100.0), momentum_scale=(0.5, 2.0), slew_up=1e6)


class Scripted(Controller):
    """Proposes what the test says: a list in order (an exception is raised), or one thing for ever."""

    name = "scripted"

    def __init__(self, *script, repeat=None):
        self.script, self.repeat, self.seen = list(script), repeat, []

    def reset(self, context):
        self.context = context

    def act(self, telemetry):
        self.seen.append(telemetry)
        proposed = self.script.pop(0) if self.script else self.repeat or NEUTRAL
        if isinstance(proposed, Exception):
            raise proposed
        return proposed


def train_lm(model, optimizer, tokens, steps=STEPS, after_step=None):
    """A plain training loop, as a user writes it."""
    for step in range(steps):
        batch = tokens(step)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if after_step is not None:
            after_step(step)


def backward(model, seed=0):
    model.zero_grad()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    loss = model(x).square().mean()
    loss.backward()
    return loss


def train_mlp(model, optimizer, governor=None, steps=10, start=0):
    for step in range(start, start + steps):
        loss = backward(model, step)
        if governor is not None:
            governor.observe(loss, tokens=4)
        optimizer.step()


def bits(model, optimizer=None):
    state = {} if optimizer is None else optimizer.state_dict()["state"]
    return copy.deepcopy((model.state_dict(), state))


def same_bits(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def executed_rates(optimizer):
    """Spies on the learning rate that the optimizer's own update sees; attach it after the governor."""
    rates = []
    optimizer.register_step_pre_hook(lambda opt, *_: rates.append(float(opt.param_groups[0]["lr"])))
    return rates


# ---- idle: the benign certificate


def test_constant_and_shadow_leave_every_bit_of_fifty_steps(make_optimizer, make_lm, tokens):
    def run(**governance):
        model = make_lm()
        optimizer = make_optimizer(model.parameters())
        governor = Governor(optimizer, model=model, total_steps=STEPS, **governance) if governance else None
        train_lm(model, optimizer, tokens)
        if governor is not None:
            summary = governor.summary()
            assert summary["decisions"] == STEPS
            assert not summary["faults"]
        return bits(model, optimizer), governor

    ungoverned, _ = run()
    constant, governor = run(controller="constant")
    assert governor.summary()["interventions"] == 0
    assert same_bits(constant, ungoverned)
    shadow, governor = run(controller="random", mode="shadow", authority=WIDE)
    assert governor.summary()["interventions"] == STEPS
    assert same_bits(shadow, ungoverned)


def test_off_attaches_nothing(make_mlp, tmp_path):
    model, plain = make_mlp(), make_mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    governor = Governor(optimizer, "random", mode="off", model=model, ledger=tmp_path / "ledger.jsonl", authority=WIDE)
    train_mlp(model, optimizer, governor)
    train_mlp(plain, torch.optim.AdamW(plain.parameters()))
    assert same_bits(bits(model), bits(plain))
    assert governor.summary()["decisions"] == 0
    assert not (tmp_path / "ledger.jsonl").exists()
    assert not model._forward_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_governing_works_on_every_optimizer(make_optimizer, make_lm, tokens):
    model = make_lm()
    optimizer = make_optimizer(model.parameters())
    governor = Governor(optimizer, "random", model=model, authority=WIDE, seed=1)
    rates = executed_rates(optimizer)
    base = float(optimizer.param_groups[0]["lr"])
    scales = []
    train_lm(model, optimizer, tokens, steps=12, after_step=lambda _: scales.append(governor.executed.lr_scale))
    assert rates == pytest.approx([base * s for s in scales])
    assert len(set(rates)) == 12
    assert float(optimizer.param_groups[0]["lr"]) == base
    assert not governor.summary()["faults"]


# ---- schedules compose


def wsd(step, warmup=4, stable=12, total=20):
    return min(1.0, step / warmup) if step < stable else (total - step) / (total - stable)


SCHEDULES = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=20),
    "wsd": lambda o: torch.optim.lr_scheduler.LambdaLR(o, wsd),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.9),
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=3, gamma=0.3),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=21),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5), torch.optim.lr_scheduler.ExponentialLR(o, 0.8)],
        milestones=[5],
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
def test_the_scheduled_rate_is_the_same_with_and_without_governor(schedule, tensor_lr, make_mlp):
    def scheduled(governed):
        model = make_mlp()
        groups = [{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2].parameters()}]
        if tensor_lr:
            groups = [{"params": model.parameters()}]
        optimizer = torch.optim.AdamW(groups, lr=torch.tensor(0.05) if tensor_lr else 0.05)
        scheduler = SCHEDULES[schedule](optimizer)
        governor = Governor(optimizer, "random", authority=WIDE, seed=5) if governed else None
        executed, rates, scales = executed_rates(optimizer), [], []
        for step in range(20):
            rates.append([float(g["lr"]) for g in optimizer.param_groups])
            backward(model, step)
            optimizer.step()
            if governor is not None:
                scales.append(governor.executed.lr_scale)
            if schedule == "plateau":
                scheduler.step(1.0)
            else:
                scheduler.step()
        return rates, executed, scales

    plain, _, _ = scheduled(governed=False)
    governed, executed, scales = scheduled(governed=True)
    assert governed == plain  # exactly, at every step, in every group
    assert executed == pytest.approx([s * lr[0] for s, lr in zip(scales, plain, strict=True)], rel=1e-6)
    assert len(set(scales)) == 20


def test_a_rate_of_exactly_zero_in_warmup_stays_zero(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for controller in ("lbw-guard", "pid", "entropic"):
        with Governor(optimizer, controller, total_steps=10) as governor:
            before = bits(model)
            train_mlp(model, optimizer, governor, steps=3)
            assert same_bits(bits(model), before)
            assert not governor.summary()["faults"]


# ---- bounded, whatever the controller does


SCALES = st.one_of(st.floats(), st.integers(-(10**320), 10**320), st.none(), st.text(max_size=2))
PROPOSALS = st.one_of(
    st.builds(Action, lr_scale=st.floats(0, 1e9), momentum_scale=st.floats(0, 1e9)),
    st.builds(
        Action,
        lr_scale=SCALES,
        momentum_scale=SCALES,
        directive=st.sampled_from([*Directive, "skip"]),
        regime=st.sampled_from(["steady", ["unhashable"], None]),
        evidence=st.sampled_from([{}, None, {"x": object()}, {("a", "b"): 1.0}]),
    ),
    st.sampled_from([None, 3.0, "faster", ValueError("on fire"), ZeroDivisionError(), RecursionError()]),
)


@given(st.lists(PROPOSALS, max_size=25), st.integers(1, 30), st.integers(1, 3))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_controller_moves_an_executed_rate_out_of_the_authority(make_mlp, proposals, suspend_after, decide_every):
    authority = Authority(
        lr_scale=(0.1, 5.0), momentum_scale=(0.5, 2.0), slew_up=1.3, suspend_after=suspend_after, max_rollbacks=1
    )
    model, base = make_mlp(), 0.01
    optimizer = torch.optim.SGD(model.parameters(), lr=base, momentum=0.9)
    controller = Scripted(*proposals)
    governor = Governor(optimizer, controller, authority=authority, decide_every=decide_every)
    spied = []

    def spy(optimizer, *_):
        if model[0].weight.grad is not None:  # else the step is skipped: it executes no rate
            spied.append([optimizer.param_groups[0][k] for k in ("lr", "momentum")])

    optimizer.register_step_pre_hook(spy)
    train_mlp(model, optimizer, governor, steps=len(proposals) * decide_every)
    last = 1.0
    for rate, momentum in spied:
        assert 0.1 * base * (1 - 1e-12) <= rate <= 5 * base * (1 + 1e-12)
        assert rate / base <= 1.3 * last * (1 + 1e-12)
        assert 0.8 - 1e-12 <= momentum <= 0.95 + 1e-12
        last = rate / base
    faults = sum(isinstance(p, Exception) for p in proposals)
    summary = governor.summary()
    assert summary["decisions"] == len(proposals)
    assert len(spied) == len(proposals) * decide_every - summary["skips"] - summary["rollbacks"]
    assert summary["suspended"] or faults < suspend_after
    assert summary["faults"].get("controller", 0) <= suspend_after
    assert optimizer.param_groups[0]["lr"] == base


@pytest.mark.parametrize("name", ["constant", "pid", "entropic", "lbw-guard", "random", "ppo"])
def test_every_controller_stays_in_a_narrow_authority(name, make_mlp, policy_folder):
    authority = Authority(lr_scale=(0.9, 1.1), momentum_scale=(0.95, 1.05), slew_up=1.05)
    controller = load_controller(policy_folder if name == "ppo" else name)
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)  # a rate that makes everyone want to act
    governor = Governor(optimizer, controller, authority=authority, total_steps=60)
    rates = executed_rates(optimizer)
    train_mlp(model, optimizer, governor, steps=60)
    scales = [r / 0.3 for r in rates]
    assert all(0.9 - 1e-9 <= s <= 1.1 + 1e-9 for s in scales)
    assert all(b <= 1.05 * a + 1e-9 for a, b in pairwise(scales))


# ---- fail-open


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


# ---- what is observed


def test_micro_batches_are_averaged_and_the_caller_s_word_wins(make_lm, tokens):
    model = make_lm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = Scripted()
    governor = Governor(optimizer, controller, model=model)
    for step in range(2):
        for micro in range(3):
            batch = tokens(micro)
            (model(input_ids=batch, labels=batch).loss / 3).backward()
            governor.observe(float(micro + 1), tokens=5)
        governor.observe(grad_norm=torch.tensor(42.0 + step))
        optimizer.step()
        optimizer.zero_grad()
    seen = controller.seen
    assert [t.loss for t in seen] == [2.0, 2.0]
    assert [t.grad_norm for t in seen] == [42.0, 43.0]
    assert [t.step for t in seen] == [0.0, 1.0]


def test_tokens_that_the_caller_counts_are_not_counted_again(make_lm, tokens):
    model = make_lm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controllers = {}
    for counted in (None, 16):
        controllers[counted] = Scripted()
        with Governor(optimizer, controllers[counted], model=model) as governor:
            for step in range(3):
                batch = tokens(step)
                model(input_ids=batch, labels=batch).loss.backward()
                governor.observe(tokens=counted)
                optimizer.step()
    for controller in controllers.values():
        # The window's clock starts before the first decision's end; tokens a step = rate × seconds a step.
        assert [t.tokens_per_second * t.step_seconds for t in controller.seen[1:]] == pytest.approx([16, 16])


def test_the_loss_is_read_from_the_model_s_output_and_evaluation_is_not_counted(make_lm, tokens):
    model = make_lm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = Scripted()
    Governor(optimizer, controller, model=model)
    losses = []
    for step in range(3):
        with torch.no_grad():
            model(input_ids=tokens(100), labels=tokens(100))
        model.eval()
        model(input_ids=tokens(101), labels=tokens(101))
        model.train()
        batch = tokens(step)
        loss = model(input_ids=batch, labels=batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [t.loss for t in controller.seen] == losses
    assert [t.tokens_per_second * t.step_seconds for t in controller.seen[1:]] == pytest.approx([16, 16])


def test_telemetry_says_what_was_executed_and_what_is_scheduled(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    controller = Scripted(Action(lr_scale=0.5, momentum_scale=1.1), Action(lr_scale=0.25), NEUTRAL)
    governor = Governor(optimizer, controller, total_steps=4, authority=WIDE)
    train_mlp(model, optimizer, governor, steps=3)
    seen = controller.seen
    assert [t.lr_scale for t in seen] == [1.0, 0.5, 0.25]
    assert [t.momentum_scale for t in seen] == [1.0, 1.1, 1.0]
    assert [t.learning_rate for t in seen] == [0.02] * 3
    assert [t.progress for t in seen] == [0.0, 0.25, 0.5]
    assert math.isnan(seen[0].update_ratio)
    assert seen[1].update_ratio > seen[2].update_ratio > 0
    assert math.isnan(seen[1].gpu_utilization) or 0 <= seen[1].gpu_utilization <= 1


def test_a_poisoned_step_is_flagged_and_skipped_by_the_guard(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    governor = Governor(optimizer, "lbw-guard", total_steps=10)
    train_mlp(model, optimizer, governor, steps=3)
    before = bits(model, optimizer)
    governor.observe(backward(model, 3))
    model[0].weight.grad[0, 0] = math.nan
    optimizer.step()
    assert governor.last_telemetry.nonfinite == 1.0
    assert same_bits(bits(model, optimizer), before)
    assert model[0].weight.grad is not None
    assert governor.summary()["skips"] == 1
    train_mlp(model, optimizer, governor, steps=3)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_closure_style_optimizers_run(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    governor = Governor(optimizer, Scripted(repeat=Action(lr_scale=0.5, momentum_scale=1.1)))
    for step in range(3):
        optimizer.step(lambda: backward(model, step))  # noqa: B023
    assert governor.summary()["decisions"] == 3
    assert not governor.summary()["faults"]


# ---- windows


@pytest.mark.parametrize("every", [1, 2, 5])
def test_a_decision_every_k_steps_holds_in_between(every, make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    script = [Action(lr_scale=1 / (2 + i)) for i in range(10)]
    controller = Scripted(*script)
    governor = Governor(optimizer, controller, decide_every=every, authority=WIDE)
    rates = executed_rates(optimizer)
    train_mlp(model, optimizer, governor, steps=10)
    assert rates == pytest.approx([script[step // every].lr_scale for step in range(10)])
    assert [t.step for t in controller.seen] == list(range(0, 10, every))
    assert governor.summary()["decisions"] == -(-10 // every)


def test_a_skip_holds_for_one_step_and_its_scale_for_the_window(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    action = Action(lr_scale=0.5, directive=Directive.SKIP)
    governor = Governor(optimizer, Scripted(action), decide_every=3)
    before = bits(model)
    train_mlp(model, optimizer, governor, steps=1)
    assert same_bits(bits(model), before)
    rates = executed_rates(optimizer)
    train_mlp(model, optimizer, governor, steps=2, start=1)
    assert not same_bits(bits(model), before)
    assert rates == [0.5, 0.5]


def test_a_frozen_policy_brings_its_own_interval(make_mlp, policy_folder):
    controller = load_controller(policy_folder)
    controller.decide_every = 4
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    governor = Governor(optimizer, controller, decide_every=1)
    train_mlp(model, optimizer, governor, steps=8)
    assert governor.summary()["decisions"] == 2


# ---- rollback


def test_rollback_restores_weights_and_optimizer_bit_for_bit(make_optimizer, make_mlp):
    model = make_mlp()
    optimizer = make_optimizer(model.parameters())
    authority = Authority(max_rollbacks=1, snapshot_every=4)
    script = [NEUTRAL] * 6 + [Action(directive=Directive.ROLLBACK)] * 2
    governor = Governor(optimizer, Scripted(*script), authority=authority)
    history = []
    for step in range(8):
        history.append(bits(model, optimizer))
        train_mlp(model, optimizer, governor, steps=1, start=step)
        if step == 6:
            assert same_bits(bits(model, optimizer), history[4])  # the last snapshot: steps 0 and 4
            assert [g["lr"] for g in optimizer.param_groups] == [optimizer.defaults["lr"]]
    assert not same_bits(bits(model, optimizer), history[4])  # the second one was denied: the step went on
    assert governor.summary()["rollbacks"] == 1
    assert not governor.summary()["faults"]


def last_reasons(path):
    return list(read_ledger(path))[-1]["reasons"]


def test_rollback_is_denied_with_a_reason_where_it_is_not_permitted(make_mlp, tmp_path):
    rollback = Action(directive=Directive.ROLLBACK)
    cases = {
        "0 done, 0 allowed": (Authority(), {}),
        "no good state has been kept": (Authority(max_rollbacks=1), {"snapshot_bytes": 10}),
    }
    for i, (reason, (authority, options)) in enumerate(cases.items()):
        model, path = make_mlp(), tmp_path / f"{i}.jsonl"
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Governor(optimizer, Scripted(NEUTRAL, rollback), authority=authority, ledger=path, **options) as governor:
            train_mlp(model, optimizer, governor, steps=1)
            before = bits(model)
            train_mlp(model, optimizer, governor, steps=1, start=1)
            assert not same_bits(bits(model), before)  # the step went on
        assert reason in last_reasons(path)[0]
        assert governor.summary()["rollbacks"] == 0


def test_only_healthy_states_are_kept(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    script = [NEUTRAL, Action(regime="loss-spike"), Action(regime="diverged"), Action(directive=Directive.ROLLBACK)]
    authority = Authority(max_rollbacks=1, snapshot_every=1)
    governor = Governor(optimizer, Scripted(*script), authority=authority)
    before = bits(model)
    train_mlp(model, optimizer, governor, steps=4)
    assert same_bits(bits(model), before)  # the state of step 0, not those of steps 1 and 2


# ---- ledger, summary, arguments


def test_the_ledger_holds_every_decision_and_can_be_decided_again(make_mlp, tmp_path):
    path = tmp_path / "run" / "ledger.jsonl"
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with Governor(optimizer, "lbw-guard", ledger=path, total_steps=20, authority=WIDE, seed=4) as governor:
        train_mlp(model, optimizer, governor, steps=20)
    header, *records = read_ledger(path)
    assert header["controller"] == "lbw-guard"
    assert header["mode"] == "govern"
    assert header["context"]["seed"] == 4
    assert Authority(**header["context"]["authority"]) == WIDE
    assert [r["step"] for r in records] == list(range(20))
    again = load_controller("lbw-guard")
    again.reset(governor.context)
    for record in records:
        action = again.act(Telemetry.from_dict(record["telemetry"]))
        assert action.lr_scale == record["proposed"]["lr_scale"]
        assert action.regime == record["regime"]
        executed, reasons = record["executed"]["lr_scale"], record["reasons"]
        assert (executed == action.lr_scale) or reasons


def test_shadow_mode_records_what_would_have_been_executed(make_mlp, tmp_path):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    script = [Action(lr_scale=0.5), Action(directive=Directive.SKIP)]
    with Governor(optimizer, Scripted(*script), mode="shadow", ledger=tmp_path / "ledger.jsonl") as governor:
        train_mlp(model, optimizer, governor, steps=2)
    _, first, second = read_ledger(tmp_path / "ledger.jsonl")
    assert first["would_execute"]["lr_scale"] == 0.5
    assert second["would_execute"]["directive"] == "skip"
    for record in (first, second):
        assert record["executed"] == {"lr_scale": 1.0, "momentum_scale": 1.0, "directive": "proceed"}
        assert "shadow mode" in record["reasons"]
    assert governor.summary()["skips"] == 1


def test_summary_has_its_keys_and_counts(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    script = [NEUTRAL, Action(lr_scale=0.5, regime="holding-back"), Action(directive=Directive.SKIP, regime="burst")]
    governor = Governor(optimizer, Scripted(*script), authority=WIDE)
    train_mlp(model, optimizer, governor, steps=4)
    summary = governor.summary()
    assert summary.pop("overhead_seconds") > 0
    assert summary == {
        "decisions": 4,
        "interventions": 2,
        "skips": 1,
        "rollbacks": 0,
        "hand_overs": 0,
        "suspended": False,
        "faults": {},
        "regimes": {"steady": 2, "holding-back": 1, "burst": 1},
        "mode": "govern",
        "controller": {},
    }
    json.dumps(governor.summary())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "advise"}, "mode: 'advise' is unknown; accepted: off, shadow, skip, lr, govern"),
        ({"controller": "lqr"}, "accepted: constant, pid, entropic, lbw-guard, ppo"),
        ({"total_steps": 0}, "total_steps: 0 must be at least 1, or None"),
        ({"decide_every": 0}, "decide_every: 0 must be at least 1"),
    ],
)
def test_a_bad_argument_is_refused_and_leaves_the_optimizer_alone(make_mlp, options, reason):
    optimizer = torch.optim.SGD(make_mlp().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=reason):
        Governor(optimizer, **({"controller": "constant"} | options))
    assert not optimizer._optimizer_step_pre_hooks


# ---- attaching and letting go


def test_close_restores_and_detaches(make_lm, tokens):
    model = make_lm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = Governor(optimizer, Scripted(repeat=Action(lr_scale=0.5)), model=model)
    rates = executed_rates(optimizer)
    train_lm(model, optimizer, tokens, steps=2)
    governor.close()
    governor.close()
    train_lm(model, optimizer, tokens, steps=2, after_step=lambda _: governor.observe(1.0))
    assert rates == [0.05, 0.05, 0.1, 0.1]
    assert governor.summary()["decisions"] == 2
    assert not model._forward_hooks
    assert governor._measurement is None  # a loop that goes on observing fills no memory


def test_closing_in_the_middle_of_a_failed_step_restores(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = Governor(optimizer, Scripted(repeat=Action(lr_scale=0.5)))
    optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_mlp(model, optimizer, governor, steps=1)
    governor.close()
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_two_governors_in_sequence_and_never_two_at_once(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rates = executed_rates(optimizer)
    with Governor(optimizer, Scripted(repeat=Action(lr_scale=0.5))) as first:
        train_mlp(model, optimizer, first, steps=1)
        with pytest.raises(ValueError, match="another governor"):
            Governor(optimizer, "constant")
        with Governor(optimizer, "constant", mode="shadow"):  # a second opinion is welcome
            pass
    with Governor(optimizer, Scripted(repeat=Action(lr_scale=0.25))) as second:
        train_mlp(model, optimizer, second, steps=1)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert len(rates) == 2
    assert first.summary()["decisions"] == second.summary()["decisions"] == 1


# ---- resume


CONTROLLERS = ["constant", "pid", "entropic", "lbw-guard", "random", "ppo"]


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize(("every", "cut"), [(1, 13), (4, 14)], ids=["each-step", "in-mid-window"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(name, every, cut, make_mlp, policy_folder):
    def start():
        model = make_mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        controller = load_controller(policy_folder if name == "ppo" else name)
        if controller.decide_every is not None:
            controller.decide_every = every
        authority = Authority(lr_scale=(1e-3, 100.0), max_rollbacks=2, snapshot_every=5)
        # No tokens are observed: a throughput is no property of the run's state.
        governor = Governor(optimizer, controller, total_steps=30, decide_every=every, authority=authority, seed=2)
        return model, optimizer, governor

    def advance(model, optimizer, governor, steps):
        for step in steps:
            governor.observe(backward(model, step))
            optimizer.step()

    whole = start()
    advance(*whole, range(30))

    model, optimizer, governor = start()
    advance(model, optimizer, governor, range(cut))
    file = io.BytesIO()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "governor": governor.state_dict()}
    torch.save(state, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, optimizer, governor = start()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    governor.load_state_dict(saved["governor"])
    advance(model, optimizer, governor, range(cut, 30))

    assert same_bits(bits(model, optimizer), bits(*whole[:2]))
    summary, expected = governor.summary(), whole[2].summary()
    for key in set(summary) - {"overhead_seconds"}:
        assert summary[key] == expected[key]


def test_a_window_cut_by_a_checkpoint_loses_none_of_its_losses(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = Scripted(), Scripted()
    with Governor(optimizer, first, decide_every=4) as governor:
        for step in range(2):
            backward(model, step)
            governor.observe(step, grad_norm=7.0, tokens=10)
            optimizer.step()
        governor.observe(2.0)  # of the step at hand
        saved = governor.state_dict()
    governor = Governor(optimizer, second, decide_every=4)
    governor.load_state_dict(saved)
    for step in range(2, 5):
        backward(model, step)
        governor.observe(2.0 * step, tokens=10)
        optimizer.step()
    (seen,) = second.seen
    assert seen.step == 4
    assert seen.loss == pytest.approx((1 + 2 + 4 + 6 + 8) / 5)  # the loss of step 0 was the first decision's
    assert seen.tokens_per_second * seen.step_seconds == pytest.approx(40 / 4)
    assert seen.grad_norm != 7.0  # that was of a step in between


def test_a_state_from_a_wider_authority_is_held_to_the_present_one(make_mlp):
    def start(**options):
        model = make_mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        governor = Governor(optimizer, Scripted(repeat=Action(lr_scale=50.0)), decide_every=4, **options)
        return model, optimizer, governor, executed_rates(optimizer)

    model, optimizer, governor, rates = start(authority=WIDE)
    train_mlp(model, optimizer, governor, steps=2)
    assert rates == [50.0, 50.0]
    for options, expected in (({"authority": Authority()}, 1.25), ({"authority": WIDE, "mode": "shadow"}, 1.0)):
        model, optimizer, resumed, rates = start(**options)
        resumed.load_state_dict(governor.state_dict())
        train_mlp(model, optimizer, resumed, steps=2, start=2)  # the rest of the window
        assert rates == [expected, expected]
