"""Runs that hit governance where it hurts: steps that raise, models that change, signals that come twice."""

import copy
import gc
import math
import threading

import pytest
import torch
from hard_case_runs import FREE, Acts, Interrupted, backward, same, weights

from lbw_rl import Action, Authority, Directive, Governor


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
