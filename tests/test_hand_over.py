"""Handing over to SGD: the rate is measured as in SWATS, the momentum is carried on, nothing happens unpermitted."""

import contextlib
import copy
import functools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import OPTIMIZERS
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lbw_rl import CONTROLLERS, Action, Authority, Controller, Directive, Governor, Telemetry, load_controller
from lbw_rl.action import NEUTRAL
from lbw_rl.actuator import Actuator
from lbw_rl.enforcer import Enforcer
from lbw_rl.hand_over import impossible
from lbw_rl.replay import replay
from lbw_rl.sgd_rate import HALF_LIFE, TOLERANCE, SgdRate, projected_rate

PERMITTED = Authority(hand_over=True, lr_scale=(1e-3, 10.0), momentum_scale=(0.5, 2.0), slew_up=1e6)
KNOWN = int(HALF_LIFE) + 10  # a step by which the rate is known in the runs below

ADAMS = {
    "adamw": (torch.optim.AdamW, {}),
    "adamw-plain": (torch.optim.AdamW, {"foreach": False}),
    "adamw-foreach": (torch.optim.AdamW, {"foreach": True}),
    "adamw-fused": (torch.optim.AdamW, {"fused": True}),
    "adamw-amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "adamw-maximize": (torch.optim.AdamW, {"maximize": True}),
    "adamw-tensor-lr": (torch.optim.AdamW, {"lr": torch.tensor(3e-3)}),
    "adamw-no-decay": (torch.optim.AdamW, {"weight_decay": 0.0}),
    "adamw-no-momentum": (torch.optim.AdamW, {"betas": (0.0, 0.99)}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.1}),
    "adam-decoupled": (torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adam-fused-maximize": (torch.optim.Adam, {"weight_decay": 0.1, "fused": True, "maximize": True}),
}
EXACT = {name for name in ADAMS if "fused" not in name}  # a fused kernel rounds in another order


class Asks(Controller):
    """Asks for the hand-over at the steps that `when` says, with further fields of the action."""

    name = "asks"
    time_limit = None

    def __init__(self, when=lambda step: True, **fields):
        self.when, self.fields, self.seen = when, fields, []

    def reset(self, context):
        pass

    def act(self, telemetry):
        self.seen.append(telemetry)
        return Action(hand_over=self.when(telemetry.step), **self.fields)


def make_model():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))


def make_adam(name, model, lr=3e-3):
    cls, options = ADAMS[name]
    return cls(model.parameters(), **{"lr": lr, **copy.deepcopy(options)})


def two_groups(model, lr=3e-3):
    first, second = list(model[0].parameters()), list(model[2].parameters())
    groups = [{"params": first, "weight_decay": 0.2}, {"params": second, "lr": lr / 3, "betas": (0.8, 0.99)}]
    return torch.optim.AdamW(groups, lr=lr)


def backward(model, step):
    model.zero_grad()
    generator = torch.Generator().manual_seed(int(step))
    x = torch.randn(16, 8, generator=generator)
    target = torch.stack([x[:, 0] * x[:, 1], x[:, 2], x[:, 3].abs()], 1)
    loss = (model(x) - target).square().mean()
    loss.backward()
    return loss


def train(model, optimizer, steps, start=0, scheduler=None):
    for step in range(start, start + steps):
        backward(model, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def bits(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def same_bits(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def decisions(path):
    return [r for line in path.read_text().splitlines() if (r := json.loads(line))["type"] == "decision"]


def matrices(model):
    return [p for p in model.parameters() if p.ndim == 2]


# ---- the rate of one step, γ


def test_the_first_adam_step_on_a_parabola_has_the_rate_that_one_computes_by_hand():
    """f = a·w²/2 at w: g = a·w, the first step of Adam is −η·sign(g), so γ·η = η²/(η·|g|), γ = 1/|g|."""
    w = torch.nn.Parameter(torch.full((4, 4), 2.0))
    governor = Governor(torch.optim.AdamW([w], lr=0.01, weight_decay=0.5, eps=0.0), Asks(lambda step: False))
    for _ in range(2):
        w.grad = None
        (1.5 * w.square().sum() / 2).backward()
        governor.optimizer.step()
    assert governor.controller.seen[1].sgd_rate == pytest.approx(1 / 3.0, rel=1e-4)
    assert math.isnan(governor.controller.seen[0].sgd_rate)


def test_sgd_at_the_rate_projects_onto_the_adam_step_as_the_step_itself():
    rng = np.random.default_rng(0)
    before, gradient = (rng.normal(size=50).astype(np.float32) for _ in range(2))
    step = (-0.01 * np.sign(gradient) * rng.uniform(0.5, 1, 50)).astype(np.float32)
    rate = np.repeat([0.1, 0.02], [20, 30])
    gamma = projected_rate(before, before + step, gradient, ((20, 0.1, 1.0, 0.0, 1.0), (30, 0.02, 1.0, 0.0, 1.0)))
    projection = (-gamma * rate * gradient) @ step / (step @ step) * step
    assert projection == pytest.approx(step, rel=1e-4)


@pytest.mark.parametrize("name", [*ADAMS, "two-groups"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_measured_rate_is_that_of_a_loop_which_looks_at_every_weight(name, scale):
    model = make_model()
    optimizer = two_groups(model) if name == "two-groups" else make_adam(name, model)
    controller = Asks(lambda step: False, lr_scale=scale)
    governor = Governor(optimizer, controller, authority=PERMITTED)
    expected = []
    for step in range(8):
        backward(model, step)
        before = [p.detach().double() for p in matrices(model)]
        gradients = [p.grad.double() for p in matrices(model)]
        optimizer.step()
        squared = along = 0.0
        groups = [g for g in optimizer.param_groups for p in g["params"] if p.ndim == 2]
        for p, w, g, group in zip(matrices(model), before, gradients, groups, strict=True):
            lr = float(group["lr"]) * scale
            decoupled = group["decoupled_weight_decay"]
            g = -g if group["maximize"] else g
            g = g if decoupled else g + group["weight_decay"] * w
            moved = p.detach().double() - (w * (1 - lr * group["weight_decay"]) if decoupled else w)
            squared += float(moved.square().sum())
            along += lr * float((moved * g).sum())
        expected.append(squared / -along)
    measured = [t.sgd_rate for t in controller.seen]
    assert measured[1:] == pytest.approx(expected[:-1], rel=2e-3)
    assert governor.summary()["faults"] == {}


def test_a_step_and_a_gradient_that_do_not_belong_together_are_no_rate(make_mlp):
    def measured(directives, poisoned=(), **options):
        model = make_mlp()
        seen = []

        class Script(Asks):
            def act(self, telemetry):
                seen.append(telemetry.sgd_rate)
                return Action(directive=directives.get(telemetry.step, Directive.PROCEED))

        governor = Governor(torch.optim.AdamW(model.parameters(), lr=1e-3), Script(), **options)
        for step in range(8):
            backward(model, step)
            if step in poisoned:
                model[0].weight.grad[0, 0] = math.nan
            governor.optimizer.step()
        assert governor.summary()["faults"] == {}
        return seen

    plain = measured({})
    assert [math.isfinite(rate) for rate in plain] == [False, *[True] * 7]
    assert all(math.isnan(rate) for rate in measured({}, decide_every=2))
    skipped = measured({3: Directive.SKIP})
    assert [math.isfinite(rate) for rate in skipped] == [False, True, True, True, False, True, True, True]
    assert skipped[:4] == pytest.approx(plain[:4], nan_ok=True)
    withheld = measured({3: Directive.SKIP}, poisoned={3})
    assert withheld == pytest.approx(skipped, nan_ok=True)
    late = measured({}, late=True)
    assert late[1:] == pytest.approx(plain[:-1], nan_ok=True)
    late = measured({}, poisoned={3}, late=True)  # withheld on the device, with zeros in the gradient's place
    assert [math.isfinite(rate) for rate in late] == [False, False, True, True, True, False, True, True]


def test_other_optimizers_have_no_rate(make_optimizer):
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    controller = Asks()
    Governor(optimizer, controller)
    train(model, optimizer, 4)
    adam = isinstance(optimizer, torch.optim.Adam)
    assert [math.isfinite(t.sgd_rate) for t in controller.seen] == [False, adam, adam, adam]


# ---- their mean, Λ


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=80), st.lists(st.floats(max_value=0.0), max_size=5))
def test_the_mean_lies_between_what_entered_and_nothing_else_enters(gammas, never):
    rate, clean = SgdRate(), SgdRate()
    for gamma in gammas:
        for junk in (math.nan, math.inf, *never):
            rate.update(Telemetry(sgd_rate=junk))
        rate.update(Telemetry(sgd_rate=gamma))
        clean.update(Telemetry(sgd_rate=gamma))
    assert rate.state_dict() == clean.state_dict()
    rate.update(Telemetry(grad_norm=math.inf))
    rate.update(Telemetry(grad_norm=math.nan))
    assert rate.state_dict() == clean.state_dict()
    assert min(gammas) * (1 - 1e-9) <= rate.value <= max(gammas) * (1 + 1e-9)
    again = SgdRate()
    again.load_state_dict(json.loads(json.dumps(rate.state_dict())))
    assert (again.value, again.unknown) == (rate.value, rate.unknown)


def test_the_rate_is_known_once_it_is_averaged_and_stands_still():
    rate = SgdRate()
    assert math.isnan(rate.value)
    rate.update(Telemetry(grad_norm=1.0))
    for _ in range(int(HALF_LIFE) - 1):
        rate.update(Telemetry(sgd_rate=40.0, grad_norm=1.0))
    assert rate.unknown == f"the SGD rate is not known: {HALF_LIFE - 1:g} of {HALF_LIFE:g} Adam steps measured"
    rate.update(Telemetry(sgd_rate=40.0, grad_norm=1.0))
    assert rate.unknown is None
    assert rate.value == pytest.approx(40.0)
    for _ in range(10):
        rate.update(Telemetry(sgd_rate=90.0, grad_norm=1.0))
    assert rate.unknown.startswith("the SGD rate is still moving: recent 7")
    for _ in range(400):
        rate.update(Telemetry(sgd_rate=90.0, grad_norm=1.0))
    assert rate.unknown is None
    assert rate.value == pytest.approx(90.0, rel=TOLERANCE)


def test_a_noisy_rate_is_known_most_of_the_time_and_near_its_median():
    """ln γ scatters with a standard deviation of 0.2 … 0.5 in a language model; a single γ strays far beyond 20 %."""
    rng, rate, known, values = np.random.default_rng(0), SgdRate(), 0, []
    for _ in range(1000):
        rate.update(Telemetry(sgd_rate=float(np.exp(rng.normal(0, 0.5))), grad_norm=1.0))
        known += rate.unknown is None
        values.append(rate.value)
    assert known > 600
    assert all(abs(math.log(v)) < 0.35 for v in values[int(HALF_LIFE) :])


def test_a_gradient_of_another_size_or_its_rest_in_the_momentum_makes_the_rate_unknown():
    rate = SgdRate()
    for _ in range(100):
        rate.update(Telemetry(sgd_rate=40.0, grad_norm=2.0))
    rate.update(Telemetry(grad_norm=9.0))  # the burst of one step enters the momentum by a tenth
    assert rate.unknown is None
    rate.update(Telemetry(grad_norm=2.0))
    assert rate.unknown is None
    rate.update(Telemetry(grad_norm=200.0))
    assert rate.unknown == "gradient or momentum may be 100 times those that the SGD rate was measured at"
    waits = 0
    while rate.unknown is not None:
        rate.update(Telemetry(grad_norm=2.0))
        waits += 1
    assert waits == 10  # 1 + 0.1·99·0.9^k ≤ 5, and a little from the smaller burst
    rate.update(Telemetry())
    assert rate.unknown == "the gradient norm is not known"


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(0.5, 2.0)), max_size=60))
def test_no_momentum_is_larger_than_its_bound(steps):
    """Whatever the gradients and the momentum scales: m after a step is at most max(M, ‖g‖)."""
    rate, m, executed = SgdRate(), np.zeros(2), 1.0
    for x, y, scale in steps:
        g = np.array([x, y])
        rate.update(Telemetry(grad_norm=float(np.linalg.norm(g)), momentum_scale=executed), beta1=0.9)
        executed = scale
        beta1 = 1 - (1 - 0.9) / scale
        m = beta1 * m + (1 - beta1) * g
        state = rate.state_dict()
        assert np.linalg.norm(m) <= max(state["momentum"], state["latest_norm"]) * (1 + 1e-9) + 1e-9


# ---- the step itself


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


# ---- permission


@pytest.mark.parametrize("value", [1, "yes", None, np.bool_(True)])
def test_what_is_no_bool_is_a_fault(value):
    ruling = Enforcer(PERMITTED).rule(Action(hand_over=value))
    assert ruling.action.regime == "fault"
    assert "hand_over is" in ruling.reasons[0]
    assert "not a bool" in ruling.reasons[0]


@pytest.mark.parametrize(
    ("authority", "mode", "directive", "why", "reason"),
    [
        (Authority(), "govern", "proceed", None, "the authority does not permit it"),
        (PERMITTED, "skip", "proceed", None, "mode is skip"),
        (PERMITTED, "govern", "skip", None, "no update is executed"),
        (PERMITTED, "govern", "proceed", "it rains", "it rains"),
    ],
)
def test_a_denied_hand_over_is_dropped_with_a_reason(authority, mode, directive, why, reason):
    proposed = Action(hand_over=True, directive=Directive(directive))
    ruling = Enforcer(authority, mode).rule(proposed, no_hand_over=why)
    assert not ruling.action.hand_over
    assert ruling.reasons == (f"hand-over denied: {reason}",)


@pytest.mark.parametrize("mode", ["lr", "govern", "shadow"])
def test_a_permitted_one_passes(mode):
    ruling = Enforcer(PERMITTED, mode).rule(Action(hand_over=True))
    assert ruling.action.hand_over
    assert ruling.reasons == ()


@pytest.mark.parametrize("name", CONTROLLERS)
def test_no_controller_hands_over_without_permission(name):
    """A wrapper around each of them that asks at every decision: the run is the one of the controller that does not."""
    runs = {}
    for asks in (False, True):
        controller = load_controller(name)
        if asks:
            controller.act = lambda telemetry, act=controller.act: replace(act(telemetry), hand_over=True)
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        governor = Governor(optimizer, controller, measure_device=False)
        train(model, optimizer, KNOWN)
        assert governor.summary()["hand_overs"] == 0
        runs[asks] = bits(model, optimizer)
    assert same_bits(runs[False], runs[True])


@pytest.mark.parametrize("mode", ["shadow", "skip", "off"])
def test_modes_without_the_scales_leave_every_bit_alone(mode, tmp_path):
    plain = make_model()
    ungoverned = torch.optim.AdamW(plain.parameters(), lr=3e-3)
    train(plain, ungoverned, KNOWN + 5)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with Governor(optimizer, Asks(), authority=PERMITTED, mode=mode, ledger=tmp_path / "ledger.jsonl"):
        train(model, optimizer, KNOWN + 5)
    assert same_bits(bits(model, optimizer), bits(plain, ungoverned))
    if mode == "shadow":
        last = decisions(tmp_path / "ledger.jsonl")[-1]
        assert last["would_execute"]["hand_over"] is True
        assert "hand_over" not in last["executed"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_hands_over_or_is_denied_and_stays_as_it_was(name, tmp_path):
    runs = []
    for governed in (False, True):
        model = make_model()
        optimizer = OPTIMIZERS[name](model.parameters())
        governor = Governor(optimizer, Asks(), authority=PERMITTED, ledger=tmp_path / "l.jsonl") if governed else None
        train(model, optimizer, KNOWN)
        runs.append(bits(model, optimizer))
    summary, last = governor.summary(), governor.last_ruling
    governor.close()
    assert summary["faults"] == {}
    if isinstance(optimizer, torch.optim.Adam):
        assert summary["hand_overs"] > 0
        assert not same_bits(*runs)
    else:
        assert summary["hand_overs"] == 0
        assert last.reasons == (f"hand-over denied: {type(optimizer).__name__} is not torch's Adam or AdamW",)
        assert same_bits(*runs)


def test_before_the_rate_is_known_the_run_is_adams():
    plain, model = make_model(), make_model()
    ungoverned = torch.optim.AdamW(plain.parameters(), lr=3e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    governor = Governor(optimizer, Asks(), authority=PERMITTED)
    for m, o in ((plain, ungoverned), (model, optimizer)):
        train(m, o, int(HALF_LIFE))
    assert same_bits(bits(model, optimizer), bits(plain, ungoverned))
    assert "Adam steps measured" in governor.last_ruling.reasons[0]


# ---- in a governed run


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
