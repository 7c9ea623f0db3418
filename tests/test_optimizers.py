"""Every optimizer of torch, in every implementation that a CPU has: a governed run is the run at the scaled rate."""

import copy
import inspect
import math

import pytest
import torch
from optimizer_variants import (
    DECOUPLED,
    EXCLUDED,
    GROUP_RATES,
    LATE,
    STEPS,
    VARIANTS,
    WIDE,
    Scripted,
    backward,
    bits,
    make_model,
    make_optimizer,
    same_bits,
    step_by_hand,
)

from lbw_rl import Action, Directive, Governor
from lbw_rl.actuator import Actuator


def test_every_optimizer_of_torch_is_here():
    classes = {
        name
        for name, cls in vars(torch.optim).items()
        if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)
    }
    assert classes - set(EXCLUDED) == {cls.__name__ for cls, _ in VARIANTS.values()}


def test_every_fused_and_every_foreach_implementation_is_here():
    for flag, named in (("fused", "-fused"), ("foreach", "-foreach")):
        classes = {cls for cls, _ in VARIANTS.values() if flag in inspect.signature(cls).parameters}
        tested = {cls for name, (cls, options) in VARIANTS.items() if options.get(flag) and named in name}
        assert classes - tested <= {torch.optim.Rprop}  # its foreach step reads no rate after the first one


@pytest.mark.parametrize("name", VARIANTS)
def test_a_governed_run_equals_the_loop_that_scales_by_hand_bit_for_bit(name):
    """Weights, optimizer state, step counters and the rates left behind, under varying rates and momenta."""
    scales = [(2.0 ** ((5 * i % 7 - 3) / 2), 1.0 if i % 3 else 1.5) for i in range(STEPS)]
    governed, plain = make_model(), make_model()
    optimizer, reference = make_optimizer(name, governed), make_optimizer(name, plain)
    script = [Action(lr_scale=s, momentum_scale=m) for s, m in scales]
    governor = Governor(optimizer, Scripted(*script), authority=WIDE)
    for step, (s, m) in enumerate(scales):
        backward(governed, step)
        backward(plain, step)
        optimizer.step()
        step_by_hand(reference, s, m)
    assert same_bits(bits(governed, optimizer), bits(plain, reference))
    assert [g["lr"] for g in optimizer.param_groups] == list(GROUP_RATES)
    assert governor.summary()["faults"] == {}


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in LATE])
@pytest.mark.parametrize("first", [True, False], ids=["first-step", "later-step"])
def test_a_step_at_scale_s_moves_every_weight_s_times_as_far(name, first):
    """Analytic: every update rule here is linear in the learning rate, decoupled or L2 decay included."""
    s = 3.0
    base, scaled = make_model(torch.float64), make_model(torch.float64)
    rates = (1e-3, 1e-4)  # Adafactor caps the rate at 1/√step
    plain, optimizer = make_optimizer(name, base, rates), make_optimizer(name, scaled, rates)
    warm = 0 if first else 3
    governor = Governor(optimizer, Scripted(*[Action()] * warm, Action(lr_scale=s)), authority=WIDE)
    for step in range(warm + 1):
        start = [p.detach().clone() for p in base.parameters()]
        for model, chosen in ((base, plain), (scaled, optimizer)):
            backward(model, step)
            chosen.step()
    assert governor.executed.lr_scale == s
    for p0, p1, p2 in zip(start, base.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p2 - p0, s * (p1 - p0), rtol=1e-6, atol=1e-13)


def test_two_optimizers_execute_a_rate_late_by_construction():
    """ASGD moves by the eta of the step before; Rprop forgets the rate after its first step. Both are torch's."""
    for name, steps_late in (("ASGD", 1), ("Rprop", math.inf)):
        moved = []
        for s in (1.0, 3.0):
            model = make_model()
            optimizer = make_optimizer(name, model)
            Governor(optimizer, Scripted(Action(), Action(lr_scale=s)), authority=WIDE)
            history = []
            for step in range(4):
                backward(model, step)
                optimizer.step()
                history.append(copy.deepcopy(model.state_dict()))
            moved.append(history)
        differs = [not same_bits(a, b) for a, b in zip(*moved, strict=True)]
        assert differs == [step >= 1 + steps_late for step in range(4)]


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_groups_keep_the_ratio_of_their_rates(name):
    model = make_model()
    optimizer = make_optimizer(name, model)
    scales = [0.25, 1.0, 8.0]
    Governor(optimizer, Scripted(*[Action(lr_scale=s) for s in scales]), authority=WIDE)
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append([g["lr"] for g in o.param_groups]))
    for step in range(3):
        backward(model, step)
        optimizer.step()
    assert seen == [[lr * s for lr in GROUP_RATES] for s in scales]


@pytest.mark.parametrize("fused", [False, True])
def test_one_tensor_rate_that_several_groups_share_is_scaled_once_and_restored(fused):
    """torch hands a default learning rate to all groups as one and the same tensor."""
    governed, plain = make_model(), make_model()

    def make(model, lr):
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
        return torch.optim.AdamW(groups, lr=lr, fused=fused)

    rate = torch.tensor(0.01)
    optimizer, reference = make(governed, rate), make(plain, torch.tensor(0.01))
    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"]
    scales = [2.0, 0.5, 4.0, 1.0]
    Governor(optimizer, Scripted(*[Action(lr_scale=s) for s in scales]), authority=WIDE)
    for step, s in enumerate(scales):
        backward(governed, step)
        backward(plain, step)
        optimizer.step()
        assert all(g["lr"] is rate for g in optimizer.param_groups)
        assert torch.equal(rate, torch.tensor(0.01))
        step_by_hand(reference, s)
        assert same_bits(governed.state_dict(), plain.state_dict())


def test_groups_that_share_a_tensor_rate_may_be_scaled_apart():
    """In place is not possible then; the one tensor comes back, untouched."""
    model, rate = make_model(), torch.tensor(0.01)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    actuator = Actuator(optimizer)
    for extra in ((2.0, 1.0), (1.0, 3.0), (2.0, 2.0)):
        actuator.apply(Action(lr_scale=0.5, group_lr_scales=extra))
        seen = [float(g["lr"]) for g in optimizer.param_groups]
        assert seen == pytest.approx([0.01 * 0.5 * x for x in extra])
        actuator.restore()
        assert all(g["lr"] is rate for g in optimizer.param_groups)
        assert torch.equal(rate, torch.tensor(0.01))


@pytest.mark.parametrize("name", DECOUPLED)
def test_decoupled_weight_decay_scales_with_the_learning_rate(name):
    """Analytic: without a gradient every weight obeys w ← w(1 − s·lr·λ), λ being the group's own."""
    model = make_model(torch.float64)
    optimizer = make_optimizer(name, model)
    scales = [1.0, 4.0, 0.25, 10.0]
    Governor(optimizer, Scripted(*[Action(lr_scale=s) for s in scales]), authority=WIDE)
    start = {p: p.detach().clone() for g in optimizer.param_groups for p in g["params"]}
    for _ in scales:
        for p in start:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for group in optimizer.param_groups:
        assert group["weight_decay"] > 0
        shrunk = math.prod(1.0 - s * group["lr"] * group["weight_decay"] for s in scales)
        for p in group["params"]:
            torch.testing.assert_close(p.detach(), start[p] * shrunk, rtol=1e-12, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("fused", [False, True])
def test_l2_decay_scales_with_the_learning_rate(momentum, fused):
    """Analytic: SGD's penalty λw is a gradient like any other, v ← μv + λw, w ← w − s·lr·v."""
    w = torch.nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))
    lr, decay = 0.1, 0.3
    optimizer = torch.optim.SGD([w], lr=lr, momentum=momentum, weight_decay=decay, fused=fused)
    scales = [1.0, 4.0, 0.25, 2.0, 2.0]
    Governor(optimizer, Scripted(*[Action(lr_scale=s) for s in scales]), authority=WIDE)
    expected, velocity = w.detach().clone(), torch.zeros_like(w.detach())
    for s in scales:
        w.grad = torch.zeros_like(w)
        optimizer.step()
        velocity = momentum * velocity + decay * expected
        expected = expected - s * lr * velocity
    torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_skip_changes_no_weight_no_state_and_no_counter_ever(name):
    """Before the first step, and later: the run goes on as if the skipped batches had never come."""
    skip = Action(directive=Directive.SKIP, lr_scale=0.5, momentum_scale=2.0)
    script = [skip, Action(), Action(), skip, skip, Action()]
    governed, plain = make_model(), make_model()
    optimizer, reference = make_optimizer(name, governed), make_optimizer(name, plain)
    governor = Governor(optimizer, Scripted(*script), authority=WIDE)
    for step, action in enumerate(script):
        backward(governed, step)
        gradients = [p.grad for p in governed.parameters()]
        before = bits(governed, optimizer)
        optimizer.step()
        assert all(p.grad is g for p, g in zip(governed.parameters(), gradients, strict=True))
        if action is skip:
            assert same_bits(bits(governed, optimizer), before)
        else:
            backward(plain, step)
            reference.step()
    assert same_bits(bits(governed, optimizer), bits(plain, reference))
    assert governor.summary()["skips"] == 3
    assert governor.summary()["faults"] == {}


@pytest.mark.parametrize("scale", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("fused", [False, True])
def test_sgd_forgets_an_impulse_over_a_horizon_s_times_as_long(scale, fused):
    """Analytic: after one gradient g the velocity decays by β′, 1/(1−β′) = s/(1−β); in all the weight moves
    lr·g·s/(1−β), so the momentum scale of SGD multiplies the distance that a gradient is worth."""
    lr, momentum = 0.1, 0.9
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=lr, momentum=momentum, fused=fused)
    Governor(optimizer, Scripted(*[Action(momentum_scale=scale)] * 2000), authority=WIDE)
    horizon = scale / (1 - momentum)
    velocities = []
    for step in range(1500):
        w.grad = torch.full_like(w, 1.0 if step == 0 else 0.0)
        optimizer.step()
        velocities.append(optimizer.state[w]["momentum_buffer"].item())
    ratio = 1 - 1 / horizon
    assert velocities[:20] == pytest.approx([ratio**k for k in range(20)], rel=1e-9)
    assert -w.item() == pytest.approx(lr * horizon, rel=1e-9)


@pytest.mark.parametrize("scale", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("fused", [False, True])
def test_adam_averages_over_a_horizon_s_times_as_long_at_the_same_speed(scale, fused):
    """Analytic: under a constant gradient the first moment is g(1 − β′ᵗ) and, bias-corrected, every step moves lr:
    the momentum scale changes what Adam averages over, not how fast it goes. Then an impulse decays by β′."""
    lr, beta, g = 0.1, 0.9, 3.0
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.Adam([w], lr=lr, betas=(beta, 0.999), eps=0.0, fused=fused)
    Governor(optimizer, Scripted(*[Action(momentum_scale=scale)] * 50), authority=WIDE)
    ratio = 1 - (1 - beta) / scale
    for t in range(1, 11):
        w.grad = torch.full_like(w, g)
        optimizer.step()
        assert optimizer.state[w]["exp_avg"].item() == pytest.approx(g * (1 - ratio**t), rel=1e-9)
        assert -w.item() == pytest.approx(t * lr, rel=1e-9)
    moment = optimizer.state[w]["exp_avg"].item()
    for k in range(1, 11):
        w.grad = torch.zeros_like(w)
        optimizer.step()
        assert optimizer.state[w]["exp_avg"].item() == pytest.approx(moment * ratio**k, rel=1e-9)


@pytest.mark.parametrize("name", ["RMSprop", "RMSprop-foreach", "SGD-momentum", "SGD-fused", "Muon"])
def test_a_horizon_below_one_step_has_no_memory_and_leaves_none_missing(name):
    """β = 0.3 halved is less than one step. torch's RMSprop makes its buffer only under a momentum above 0, and
    SGD lets it go stale at exactly 0: the steps after must find a buffer that holds the last gradient alone."""
    cls, options = VARIANTS[name]
    model = make_model()
    parameters = [p for p in model.parameters() if p.ndim == 2]
    optimizer = cls(parameters, lr=0.01, **{**options, "momentum": 0.3})
    half = Action(momentum_scale=0.5)
    governor = Governor(optimizer, Scripted(half, half, Action(), half), authority=WIDE)
    for step in range(5):
        backward(model, step)
        held = [optimizer.state[p].get("momentum_buffer") for p in parameters]
        held = [None if b is None else b.clone() for b in held]
        optimizer.step()
        for p, old in zip(parameters, held, strict=True):
            new = optimizer.state[p]["momentum_buffer"]
            assert old is None or not torch.equal(old, new)  # never stale
    assert all(torch.isfinite(p).all() for p in parameters)
    assert all(g["momentum"] == 0.3 for g in optimizer.param_groups)
    assert governor.summary()["faults"] == {}
