"""Runs that hit governance where it hurts: steps that raise, models that change, signals that come twice."""

import copy
import gc
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from lbw_rl import Action, Authority, Controller, Directive, Governor, load_controller
from lbw_rl.replay import replay

FREE = Authority(lr_scale=(1e-3, 100.0), slew_up=1e6, max_rollbacks=1, snapshot_every=100, rollback_cooldown=0)


class Acts(Controller):
    """Acts by a function of the number of the decision."""

    name = "acts"

    def __init__(self, act=lambda n: Action()):
        self.function = act

    def reset(self, context):
        self.n = -1
        self.seen = []

    def act(self, telemetry):
        self.n += 1
        self.seen.append(telemetry)
        return self.function(self.n)


def backward(model, step=0, poisoned=False):
    model.zero_grad()
    loss = model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().mean()
    (loss * math.nan if poisoned else loss).backward()
    return loss


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_kill_signal_that_comes_twice_does_not_end_the_run(tmp_path):
    """Whoever kills governance may ask again: the default action of SIGUSR1 would end the process."""
    script = textwrap.dedent(
        """
        import os, signal, torch
        from lbw_rl import Governor
        model = torch.nn.Linear(4, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Governor(optimizer, "lbw-guard", kill_signal=signal.SIGUSR1)
        for _ in range(4):
            model(torch.ones(2, 4)).square().mean().backward()
            optimizer.step()
            os.kill(os.getpid(), signal.SIGUSR1)
        print("lived")
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "lived"), done.stderr


def test_nothing_takes_a_kill_back(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    governor = Governor(optimizer, Acts(), kill_signal=signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGUSR2)
    governor.set_mode("lr")
    backward(model)
    optimizer.step()
    assert governor.mode == "off"


def test_a_kill_does_not_wait_for_the_next_decision(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    governor = Governor(optimizer, Acts(lambda n: Action(lr_scale=0.5)), authority=FREE, decide_every=10)
    rates = []
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    for step in range(4):
        if step == 2:
            governor.set_mode("off")
        backward(model, step)
        optimizer.step()
    assert rates == [0.5, 0.5, 1.0, 1.0]


def test_a_constructor_that_fails_leaves_nothing_attached(make_mlp):
    """Only the main thread may install a signal handler."""
    original = torch.nn.utils.clip_grad_norm_
    model, errors = make_mlp(), []

    def build():
        try:
            Governor(torch.optim.SGD(model.parameters(), lr=1.0), "constant", model=model, kill_signal=signal.SIGUSR2)
        except ValueError as e:
            errors.append(e)

    thread = threading.Thread(target=build)
    thread.start()
    thread.join()
    assert len(errors) == 1
    assert not model._forward_hooks
    assert torch.nn.utils.clip_grad_norm_ is original


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("poisoned", [2, 4, 5])
def test_late_governance_withholds_poison_between_two_decisions_too(make_mlp, fused, poisoned):
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    governor = Governor(optimizer, Acts(), late=True, decide_every=4)
    for step in range(9):
        backward(model, step, poisoned=step == poisoned)
        before = weights(model)
        optimizer.step()
        if step == poisoned and fused:
            assert same(before, weights(model))
    assert all(w.isfinite().all() for w in weights(model))
    assert governor.summary()["faults"] == {}
    if poisoned == 4:  # at a decision: known at the next one
        assert governor.summary()["skips"] == 1


class Interrupted(torch.optim.SGD):
    """A step that can be made to raise in the middle."""

    fails = False

    def step(self, closure=None):
        if self.fails:
            raise KeyboardInterrupt
        return super().step(closure)


def test_a_poisoned_step_that_raises_does_not_stop_learning_for_good(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    Governor(optimizer, Acts(), late=True)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(interrupt)
    backward(model, poisoned=True)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    handle.remove()
    before = weights(model)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    assert not same(before, weights(model))


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_that_raised_leaves_the_scheduled_rate_to_checkpoints_and_schedulers(make_mlp, with_closure):
    model = make_mlp()
    optimizer = Interrupted(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    Governor(optimizer, Acts(lambda n: Action(lr_scale=0.5)), authority=FREE)
    backward(model)
    optimizer.fails = not with_closure

    def closure():
        raise KeyboardInterrupt

    try:
        optimizer.step(closure) if with_closure else optimizer.step()
    except KeyboardInterrupt:
        assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.1  # as an emergency checkpoint would hold it
    assert optimizer.param_groups[0]["lr"] == 0.1
    optimizer.fails = False
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.09)
    backward(model)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.09)


def test_a_step_that_raised_keeps_nothing_of_its_callers_alive(make_mlp):
    import weakref

    model = make_mlp()
    optimizer = Interrupted(model.parameters(), lr=0.1)
    governor = Governor(optimizer, Acts(), authority=FREE)
    optimizer.fails = True

    def train():
        activations = torch.nn.Module()  # stands for gigabytes
        kept.append(weakref.ref(activations))
        backward(model)
        optimizer.step()

    kept = []
    with pytest.raises(KeyboardInterrupt):
        train()
    gc.collect()
    assert kept[0]() is None
    assert governor.step == 0


def test_another_hook_that_replaces_the_arguments_does_not_end_the_step_early(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Governor(optimizer, Acts(lambda n: Action(lr_scale=0.5)), authority=FREE)
    rates = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, dict(kwargs)))
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    for step in range(3):
        backward(model, step)
        optimizer.step()
    assert rates == [0.5] * 3
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_snapshot_of_other_parameters_is_not_put_back():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    back = Acts(lambda n: Action(directive=Directive.ROLLBACK if n == 5 else Directive.PROCEED))
    governor = Governor(optimizer, back, model=model, authority=FREE)
    new = torch.nn.Parameter(torch.ones(8))
    for step in range(6):
        if step == 3:
            optimizer.add_param_group({"params": [new]})
        backward(model, step)
        new.grad = torch.ones(8)
        before = [*weights(model), new.detach().clone()]
        optimizer.step()
    assert same(before, [*weights(model), new.detach()])  # withheld, and nothing mixed up
    assert governor.summary()["faults"] == {"snapshot": 1}


def test_a_copy_that_fails_half_way_leaves_no_mixture(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    governor = Governor(optimizer, Acts(), authority=Authority(max_rollbacks=1, snapshot_every=1))
    for step in range(3):
        if step == 2:
            optimizer.state[model[0].weight]["lock"] = threading.Lock()  # cannot be copied
        backward(model, step)
        optimizer.step()
    assert governor.summary()["faults"] == {"snapshot": 1}
    assert governor.summary()["regimes"] == {"steady": 3}


def test_state_that_belongs_to_no_parameter_goes_back_too(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state["global"]["n"] = 2
    back = Acts(lambda n: Action(directive=Directive.ROLLBACK if n == 2 else Directive.PROCEED))
    Governor(optimizer, back, authority=FREE)
    for step in range(3):
        optimizer.state["global"]["n"] += step
        backward(model, step)
        optimizer.step()
    assert optimizer.state["global"]["n"] == 2


def test_a_scheduler_by_any_name_is_rewound_with_its_rate(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    back = Acts(lambda n: Action(directive=Directive.ROLLBACK if n == 3 else Directive.PROCEED))
    Governor(optimizer, back, authority=FREE, stateful={"warmup": schedule})
    for step in range(4):
        backward(model, step)
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5  # as after the first step


def test_what_shadow_mode_would_have_done_costs_no_budget(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    back = Acts(lambda n: Action(directive=Directive.ROLLBACK if n in (1, 6) else Directive.PROCEED))
    authority = FREE.model_copy(update={"snapshot_every": 1})
    governor = Governor(optimizer, back, authority=authority, mode="shadow")
    for step in range(8):
        if step == 4:
            governor.set_mode("govern")
        backward(model, step)
        before = weights(model)
        optimizer.step()
        if step == 6:
            assert governor.executed.directive is Directive.ROLLBACK
            assert not same(before, weights(model))


def test_an_internal_fault_holds_for_its_window(make_mlp, monkeypatch):
    """The scale that the fault refused must not come back at the window's next step."""
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    governor = Governor(optimizer, Acts(lambda n: Action(lr_scale=0.01)), authority=FREE, decide_every=3)
    rates = []
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    for step in range(6):
        if step == 3:
            monkeypatch.setattr(governor, "_take", lambda: 1 / 0)
        backward(model, step)
        optimizer.step()
    assert rates == [0.01] * 3 + [1.0] * 3


def test_a_rate_that_the_optimizer_makes_itself_is_left_alone(make_mlp):
    class Relative(torch.optim.SGD):
        """As transformers' Adafactor with lr=None."""

        def __init__(self, params):
            super().__init__(params, lr=0.1)
            self.param_groups[0]["lr"] = None

        def step(self, closure=None):
            return None

    model = make_mlp()
    optimizer = Relative(model.parameters())
    governor = Governor(optimizer, Acts(lambda n: Action(lr_scale=0.5)), authority=FREE)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    assert governor.summary()["faults"] == {}
    assert optimizer.param_groups[0]["lr"] is None


def test_the_other_network_s_clipping_is_not_mine(make_mlp):
    """A GAN's two optimizers: one is stepped without gradients while the other's are clipped."""
    mine, other = make_mlp(), make_mlp()
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
    governor = Governor(optimizer, Acts())
    backward(other)
    torch.nn.utils.clip_grad_norm_(other.parameters(), 1e-3)
    backward(mine)
    own = math.sqrt(sum(float(p.grad.square().sum()) for p in mine.parameters()))
    optimizer.step()
    assert governor.last_telemetry.grad_norm == pytest.approx(own, rel=1e-5)


def test_half_precision_gradients_past_its_range_are_finite():
    p = torch.nn.Parameter(torch.zeros(400, 400, dtype=torch.float16))
    optimizer = torch.optim.SGD([p], lr=1e-6)
    governor = Governor(optimizer, Acts())
    p.grad = torch.full_like(p, 256.0)
    optimizer.step()
    assert governor.last_telemetry.grad_norm == pytest.approx(256 * 400)
    assert governor.last_telemetry.nonfinite == 0.0


def test_sparse_gradients_are_withheld_on_the_device_too():
    embedding = torch.nn.Embedding(20, 4, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.5)
    governor = Governor(optimizer, Acts(), late=True)
    for step in range(4):
        optimizer.zero_grad()
        loss = embedding(torch.tensor([1, 5, 7])).square().sum()
        (loss * math.nan if step == 2 else loss).backward()
        optimizer.step()
    assert embedding.weight.isfinite().all()
    assert governor.summary()["faults"] == {}


def test_switching_which_layer_trains_moves_the_sample_along(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layers = [m for m in model if isinstance(m, torch.nn.Linear)]
    controller = Acts()
    Governor(optimizer, controller)
    for step in range(8):
        for i, layer in enumerate(layers):
            layer.requires_grad_(i == (step // 4) % len(layers))
        backward(model, step)
        optimizer.step()
    assert all(t.update_ratio > 0 for t in (controller.seen[3], controller.seen[7]))


def test_a_copy_of_the_model_brings_no_hook_that_collects_for_nobody(make_lm, tokens):
    model = make_lm()
    governor = Governor(torch.optim.SGD(model.parameters(), lr=0.1), "constant", model=model)
    average = copy.deepcopy(model)
    hooks = list(average._forward_hooks.values())
    for _ in range(3):
        average(input_ids=tokens(0), labels=tokens(0))
    assert all(len(h.__self__._from_model) == 0 for h in hooks if hasattr(h, "__self__"))
    assert len(governor._measurement.observer._from_model) == 0


def test_a_forward_pass_that_cannot_be_read_is_no_error_of_the_model(make_lm, tokens):
    model = make_lm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = Governor(optimizer, "constant", model=model)

    class Odd(torch.nn.Module):
        def forward(self, input_ids, labels, num_items_in_batch):
            return model(input_ids=input_ids, labels=input_ids)

    odd = Odd()
    governor.close()
    with Governor(optimizer, "constant", model=odd) as governor:
        odd(input_ids=tokens(0), labels=torch.tensor(3), num_items_in_batch=4).loss.backward()
        optimizer.step()
        assert governor.summary()["faults"] == {"observer": 1}


def test_closing_from_within_a_controller_leaves_no_scale_behind(make_mlp):
    class Quits(Acts):
        def rolled_back(self):
            governor.close()

    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    quits = Quits(lambda n: Action(lr_scale=0.5, directive=Directive.ROLLBACK if n == 2 else Directive.PROCEED))
    governor = Governor(optimizer, quits, authority=FREE)
    for step in range(5):
        backward(model, step)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_governor_that_was_told_to_let_go_stays_off_after_a_resume(make_mlp, tmp_path, caplog):
    def build():
        model = make_mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        halve = Acts(lambda n: Action(lr_scale=0.5))
        return model, optimizer, Governor(optimizer, halve, authority=FREE, ledger=tmp_path / "l.jsonl")

    model, optimizer, governor = build()
    for step in range(4):
        if step == 2:
            governor.set_mode("off")
        backward(model, step)
        optimizer.step()
    state = governor.state_dict()
    model, optimizer, governor = build()
    governor.load_state_dict(state)
    rates = []
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    backward(model)
    optimizer.step()
    assert rates == [1.0]
    assert governor.mode == "off"
    assert "it stays off" in caplog.text


def test_a_resume_in_another_mode_is_in_the_ledger(make_mlp, tmp_path):
    saved = None
    for mode in ("shadow", "lr"):
        model = make_mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with Governor(optimizer, Acts(), authority=FREE, mode=mode, ledger=tmp_path / "l.jsonl") as governor:
            if saved is not None:
                governor.load_state_dict(saved)
            backward(model)
            optimizer.step()
            saved = governor.state_dict()
    kinds = [json.loads(line)["type"] for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert kinds == ["header", "decision", "mode", "decision"]


def test_the_ledgers_of_two_runs_in_one_file_are_told_apart(make_mlp, tmp_path):
    for controller in ("constant", "pid", "pid"):
        model = make_mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with Governor(optimizer, controller, ledger=tmp_path / "l.jsonl"):
            backward(model)
            optimizer.step()
    records = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert [r.get("controller") for r in records if r["type"] == "header"] == ["constant", "pid"]
    with pytest.raises(ValueError, match="holds several runs; accepted: one run a ledger"):
        replay(tmp_path / "l.jsonl", load_controller("pid"))
