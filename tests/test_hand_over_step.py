"""One step handed over: the weights move as torch's SGD moves them, the moments go on as Adam's."""

import math

import pytest
import torch
from governed_runs import same_bits
from hand_over_runs import (
    ADAMS,
    EXACT,
    PERMITTED,
    Asks,
    backward,
    bits,
    make_adam,
    make_model,
    train,
    two_groups,
)

from lbw_rl import Action, Governor
from lbw_rl.actuator import Actuator
from lbw_rl.hand_over import impossible
from lbw_rl.sgd_rate import HALF_LIFE


@pytest.mark.parametrize("name", ADAMS)
def test_a_handed_over_run_is_torchs_sgd_with_the_moments_as_its_momentum(name):
    """SGD(momentum = dampening = β₁) whose buffers are the first moments; decoupled decay as AdamW applies it."""
    handed, plain = make_model(), make_model()
    optimizer, twin = make_adam(name, handed), make_adam(name, plain)
    for model, adam in ((handed, optimizer), (plain, twin)):
        train(model, adam, 5)
    group = twin.param_groups[0]
    lr, decay, decoupled = float(group["lr"]), group["weight_decay"], group["decoupled_weight_decay"]
    beta1 = group["betas"][0]
    sgd = torch.optim.SGD(
        plain.parameters(),
        lr=30.0 * lr,
        momentum=beta1,
        dampening=beta1,
        weight_decay=0.0 if decoupled else decay,
        maximize=False,
    )
    for p in plain.parameters():
        sgd.state[p]["momentum_buffer"] = twin.state[p]["exp_avg"].clone()
    actuator = Actuator(optimizer)
    for step in range(5, 25):
        backward(handed, step)
        gradients = [p.grad for p in handed.parameters()]
        actuator.apply(Action(hand_over=True), 30.0)
        optimizer.step()
        actuator.restore()
        assert all(p.grad is g for p, g in zip(handed.parameters(), gradients, strict=True))
        backward(plain, step)
        with torch.no_grad():
            for p in plain.parameters():
                if group["maximize"]:
                    p.grad.neg_()
                if decoupled and decay:
                    p.mul_(1 - lr * decay)
        sgd.step()
    for a, b in zip(handed.parameters(), plain.parameters(), strict=True):
        if name in EXACT and name not in ("adamw-tensor-lr", "adamw-no-momentum"):
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*ADAMS, "two-groups"])
def test_the_moments_go_on_as_adam_would_have_moved_them(name):
    """Fed the same gradients, so that only the rule differs; letting go then is one ordinary step of Adam."""
    handed, plain = make_model(), make_model()
    make = two_groups if name == "two-groups" else lambda model: make_adam(name, model)
    optimizer, twin = make(handed), make(plain)
    if not optimizer.param_groups[0].get("decoupled_weight_decay"):  # a coupled decay would feed the weights back
        optimizer.param_groups[0]["weight_decay"] = twin.param_groups[0]["weight_decay"] = 0.0
    actuator = Actuator(optimizer)
    for step in range(20):
        backward(plain, step)
        for p, q in zip(handed.parameters(), plain.parameters(), strict=True):
            p.grad = q.grad.clone()
        if 5 <= step < 19:
            actuator.apply(Action(hand_over=True, momentum_scale=1.0), 10.0)
        if step == 19:
            with torch.no_grad():
                for p, q in zip(handed.parameters(), plain.parameters(), strict=True):
                    p.copy_(q)
        optimizer.step()
        actuator.restore()
        twin.step()
        for p, q in zip(handed.parameters(), plain.parameters(), strict=True):
            a, b = optimizer.state[p], twin.state[q]
            assert a.keys() == b.keys()
            for key in a:
                torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-8)
    for p, q in zip(handed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_a_governed_run_is_swats_written_out():
    """Algorithm 1 of Keskar & Socher with the first moment carried on and Λ averaged as `SgdRate` says, in float64."""
    lr, beta1, beta2, eps, steps, switch = 3e-3, 0.9, 0.999, 1e-8, 90, 70
    governed, reference = make_model().double(), make_model().double()
    optimizer = torch.optim.AdamW(governed.parameters(), lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=0.0)
    governor = Governor(optimizer, Asks(lambda step: step >= switch), authority=PERMITTED)

    parameters = list(reference.parameters())
    m = [torch.zeros_like(p) for p in parameters]
    a = [torch.zeros_like(p) for p in parameters]
    log_mean, count = 0.0, 0
    for k in range(1, steps + 1):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(k)).double()
        for model in (governed, reference):
            model.zero_grad()
            (model(x) - x[:, :3] * x[:, 3:6]).square().mean().backward()
        optimizer.step()
        squared = along = 0.0
        with torch.no_grad():
            for i, w in enumerate(parameters):
                g = w.grad
                m[i] = beta1 * m[i] + (1 - beta1) * g
                if k > switch:
                    w -= math.exp(log_mean) * lr * m[i]
                    continue
                a[i] = beta2 * a[i] + (1 - beta2) * g * g
                p = (
                    -lr
                    * math.sqrt(1 - beta2**k)
                    / (1 - beta1**k)
                    * m[i]
                    / (a[i].sqrt() + eps * math.sqrt(1 - beta2**k))
                )
                w += p
                if w.ndim == 2:  # the sample is of the matrices
                    squared += float(p.square().sum())
                    along += lr * float((p * g).sum())
        if k <= switch and -along > 0:
            count += 1
            weight = max(1 - 0.5 ** (1 / HALF_LIFE), 1 / count)
            log_mean += weight * (math.log(squared / -along) - log_mean)
    assert governor.summary()["hand_overs"] == steps - switch
    assert governor.summary()["faults"] == {}
    for w, v in zip(governed.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(w, v, rtol=1e-4, atol=1e-5)  # the probe reads in single precision


def test_scales_and_schedule_multiply_the_rate_of_sgd_and_nothing_stays_in_the_groups():
    model = make_model()
    optimizer = two_groups(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(model, optimizer, 3, scheduler=scheduler)
    base = [(g["lr"], g["betas"]) for g in optimizer.param_groups]
    backward(model, 3)
    expected = []
    for group, extra in zip(optimizer.param_groups, (1.0, 4.0), strict=True):
        beta = 1 - (1 - group["betas"][0]) / 2.0
        lr = group["lr"] * 0.5 * extra
        for p in group["params"]:
            m = beta * optimizer.state[p]["exp_avg"] + (1 - beta) * p.grad
            expected.append(p.detach() * (1 - lr * group["weight_decay"]) - 7.0 * lr * m)
    actuator = Actuator(optimizer)
    actuator.apply(Action(hand_over=True, lr_scale=0.5, group_lr_scales=(1.0, 4.0), momentum_scale=2.0), 7.0)
    optimizer.step()
    actuator.restore()
    for p, w in zip((p for g in optimizer.param_groups for p in g["params"]), expected, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-5, atol=1e-7)
    assert [(g["lr"], g["betas"]) for g in optimizer.param_groups] == base
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(3e-3 * 0.9**4)


def test_a_tensor_without_moments_takes_the_optimizers_own_step_which_makes_them():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model[0].weight.requires_grad_(False)
    train(model, optimizer, 3)
    model[0].weight.requires_grad_(True)
    idle, before = model[2].bias, [p.detach().clone() for p in model.parameters()]
    actuator = Actuator(optimizer)
    for step in (3, 4):
        backward(model, step)
        idle.grad = None  # takes no part: it stays where it is
        actuator.apply(Action(hand_over=True), 5.0)
        optimizer.step()
        actuator.restore()
        counts = [int(optimizer.state[p]["step"]) for p in model.parameters()]
        assert counts == [step - 2, step + 1, step + 1, 3]
    assert torch.equal(idle, before[3])
    assert not any(torch.equal(p, w) for p, w in zip(list(model.parameters())[:3], before))


def test_a_step_that_cannot_be_handed_over_is_refused_before_anything_moves():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 2)
    backward(model, 2)
    before = bits(model, optimizer)
    for rate in (math.nan, math.inf, 0.0, -1.0):
        with pytest.raises(ValueError, match=r"rate .* must be > 0 and finite"):
            Actuator(optimizer).apply(Action(hand_over=True), rate)
    optimizer.grad_scale = torch.tensor(2.0)
    with pytest.raises(ValueError, match="a GradScaler leaves unscaling to the fused optimizer"):
        Actuator(optimizer).apply(Action(hand_over=True), 1.0)
    with pytest.raises(ValueError, match="SGD is not torch's Adam or AdamW"):
        Actuator(torch.optim.SGD(model.parameters(), lr=1.0)).apply(Action(hand_over=True), 1.0)
    assert same_bits(bits(model, optimizer), before)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"capturable": True}, "the optimizer is capturable"),
        ({"differentiable": True}, "the optimizer is differentiable"),
        ({}, "a parameter group mixes sharded and whole tensors"),
    ],
)
def test_settings_under_which_it_is_impossible_are_named(setting, reason, monkeypatch):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), **setting)
    if not setting:
        assert impossible(optimizer) is None
        monkeypatch.setattr("lbw_rl.hand_over.is_sharded", lambda p: p is model[0].weight)
    assert impossible(optimizer) == reason
    assert impossible(type("Own", (torch.optim.AdamW,), {})(model.parameters())) == "Own is not torch's Adam or AdamW"


def test_a_group_that_fails_half_way_moves_no_second_time_and_the_next_one_takes_its_own_step(monkeypatch):
    model = make_model()
    optimizer = two_groups(model)
    train(model, optimizer, 3)
    backward(model, 3)
    counts = [int(optimizer.state[p]["step"]) for p in model.parameters()]

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("lbw_rl.hand_over.sgd", broken)
    faults = []
    actuator = Actuator(optimizer, lambda source, error: faults.append((source, str(error))))
    actuator.apply(Action(hand_over=True), 5.0)
    optimizer.step()
    actuator.restore()
    assert faults == [("hand-over", "out of memory")]
    assert [int(optimizer.state[p]["step"]) for p in model.parameters()] == [n + 1 for n in counts]
    assert all(p.grad is not None for p in model.parameters())
