"""Every optimizer of torch, in every implementation that a CPU has: a governed run is the run at the scaled rate."""

import copy
import inspect
import math

import pytest
import torch

from lbw_rl import Action, Authority, Controller, Directive, Governor
from lbw_rl.actuator import Actuator

WIDE = Authority(lr_scale=(1e-3, 100.0), momentum_scale=(0.1, 4.0), slew_up=1e6)
STEPS = 8

# name → class and keyword arguments. Learning rates are those of `GROUP_RATES`.
VARIANTS = {
    "Adadelta": (torch.optim.Adadelta, {}),
    "Adafactor": (torch.optim.Adafactor, {"weight_decay": 0.01}),
    "Adagrad": (torch.optim.Adagrad, {"weight_decay": 0.01}),
    "Adam": (torch.optim.Adam, {"weight_decay": 0.01}),
    "Adamax": (torch.optim.Adamax, {}),
    "AdamW": (torch.optim.AdamW, {}),
    "ASGD": (torch.optim.ASGD, {"weight_decay": 0.01}),
    "Muon": (torch.optim.Muon, {}),
    "NAdam": (torch.optim.NAdam, {"decoupled_weight_decay": True, "weight_decay": 0.01}),
    "RAdam": (torch.optim.RAdam, {"decoupled_weight_decay": True, "weight_decay": 0.01}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "Rprop": (torch.optim.Rprop, {}),
    "SGD": (torch.optim.SGD, {}),
    "SGD-momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 1e-3}),
    "SGD-nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "SGD-fused": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-3, "fused": True}),
    "SGD-maximize": (torch.optim.SGD, {"momentum": 0.9, "maximize": True}),
    "Adagrad-fused": (torch.optim.Adagrad, {"fused": True}),
    "Adam-decoupled": (torch.optim.Adam, {"decoupled_weight_decay": True, "weight_decay": 0.01}),
    "Adam-fused": (torch.optim.Adam, {"fused": True, "weight_decay": 0.01}),
    "AdamW-fused": (torch.optim.AdamW, {"fused": True}),
    "AdamW-fused-amsgrad": (torch.optim.AdamW, {"fused": True, "amsgrad": True}),
    "AdamW-amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "AdamW-maximize": (torch.optim.AdamW, {"maximize": True}),
    "AdamW-tensor-betas": (
        torch.optim.AdamW,
        {"betas": (torch.tensor(0.9), torch.tensor(0.999)), "foreach": False},
    ),
}
for _name in (
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "SGD",
):
    _cls, _options = VARIANTS[_name]
    VARIANTS[f"{_name}-foreach"] = (_cls, {**_options, "foreach": True})

EXCLUDED = {
    "Optimizer": "the base class",
    "LBFGS": "wants a closure: tested by itself below",
    "SparseAdam": "refuses dense gradients: tested by itself below",
}
# Not on a CPU: capturable=True is refused in eager mode ("params … must be on supported devices: cuda, xpu, …"); a
# compiled step runs it, see test_compile.py. differentiable=True wants parameters that are no leaves: tested below.

GROUP_RATES = (0.02, 0.003)  # of two parameter groups

# Where a scale does not act on the update of its own step.
LATE = {
    "ASGD": "keeps its rate in state['eta'], computed at the end of the step before",
    "ASGD-foreach": "as ASGD",
    "Rprop": "reads the learning rate once, to set the step sizes of its first step",
}


class Scripted(Controller):
    """Proposes the given actions in order, then leaves the run alone."""

    name = "scripted"

    def __init__(self, *script):
        self.script = list(script)

    def reset(self, context):
        pass

    def act(self, telemetry):
        return self.script.pop(0) if self.script else Action()


def make_model(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3)).to(dtype)


def make_optimizer(name, model, rates=GROUP_RATES):
    cls, options = VARIANTS[name]
    groups = [{"params": list(layer.parameters()), "lr": lr} for layer, lr in zip((model[0], model[2]), rates)]
    if cls is torch.optim.Muon:  # matrices only
        for group in groups:
            group["params"] = [p for p in group["params"] if p.ndim == 2]
    return cls(groups, **copy.deepcopy(options))


def backward(model, step):
    model.zero_grad()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).to(model[0].weight.dtype)
    loss = model(x).square().mean()
    loss.backward()
    return loss


def bits(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def same_bits(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def scaled_momentum(momentum, scale):
    """An averaging horizon 1/(1−β) times `scale`, as a loop written by hand would have it."""
    return 1.0 - (1.0 - momentum) / scale


def step_by_hand(optimizer, lr_scale, momentum_scale=1.0):
    """What governance does to one step, without it."""
    before = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * lr_scale
        if momentum_scale != 1.0 and "betas" in group:
            group["betas"] = (scaled_momentum(float(group["betas"][0]), momentum_scale), *group["betas"][1:])
        elif momentum_scale != 1.0 and group.get("momentum"):
            group["momentum"] = scaled_momentum(group["momentum"], momentum_scale)
    optimizer.step()
    for group, saved in zip(optimizer.param_groups, before):
        group.update(saved)


# ---- nothing is left out


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


# ---- a governed run is the run at the scaled rate


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


# ---- weight decay


DECOUPLED = ["AdamW", "AdamW-foreach", "AdamW-fused", "Adam-decoupled", "NAdam", "RAdam", "Muon", "Adafactor"]


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


# ---- skipping


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


# ---- momentum is a horizon


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


# ---- closures


def lbfgs_pair(search):
    governed, plain = make_model(), make_model()
    optimizer, reference = (
        torch.optim.LBFGS(m.parameters(), lr=0.2, max_iter=5, line_search_fn=search) for m in (governed, plain)
    )
    return governed, plain, optimizer, reference


SEARCH = pytest.mark.parametrize("search", [None, "strong_wolfe"])


@SEARCH
def test_lbfgs_under_an_idle_governor_equals_itself_bit_for_bit(search):
    """A step of LBFGS runs its closure several times, gradients and all; a decision is made once."""
    governed, plain, optimizer, reference = lbfgs_pair(search)
    governor = Governor(optimizer, "constant")
    for _ in range(4):
        returned = optimizer.step(lambda: backward(governed, 0))
        assert torch.equal(returned, reference.step(lambda: backward(plain, 0)))
    assert same_bits(bits(governed, optimizer), bits(plain, reference))
    assert governor.summary()["decisions"] == governor.step == 4
    assert governor.summary()["faults"] == {}


@SEARCH
def test_lbfgs_executes_a_scale_one_step_late(search):
    """It reads its rate before its closure brings the gradients that a decision needs: what a step executes is the
    scale of the decision before it, equal to a loop that scales by hand."""
    scales = [0.5, 1.0, 2.0, 0.25]
    governed, plain, optimizer, reference = lbfgs_pair(search)
    governor = Governor(optimizer, Scripted(*[Action(lr_scale=s) for s in scales]), authority=WIDE)
    for s in [1.0, *scales[:-1]]:
        returned = optimizer.step(lambda: backward(governed, 0))
        reference.param_groups[0]["lr"] = 0.2 * s
        assert torch.equal(returned, reference.step(lambda: backward(plain, 0)))
    reference.param_groups[0]["lr"] = 0.2
    assert same_bits(bits(governed, optimizer), bits(plain, reference))
    assert governor.summary()["faults"] == {}


def test_a_skipped_step_of_lbfgs_moves_no_weight():
    governed, _, optimizer, _ = lbfgs_pair(None)
    governor = Governor(optimizer, Scripted(Action(), Action(directive=Directive.SKIP)), authority=WIDE)
    optimizer.step(lambda: backward(governed, 0))
    before = copy.deepcopy(governed.state_dict())
    optimizer.step(lambda: backward(governed, 1))
    assert same_bits(governed.state_dict(), before)
    optimizer.step(lambda: backward(governed, 2))
    assert not same_bits(governed.state_dict(), before)
    assert governor.summary()["skips"] == 1
    assert governor.summary()["faults"] == {}


CLOSURES = ["SGD-momentum", "AdamW", "AdamW-fused", "Adafactor", "Muon"]


@pytest.mark.parametrize("name", CLOSURES)
@pytest.mark.parametrize("by_keyword", [False, True], ids=["positional", "keyword"])
def test_a_step_with_a_closure_equals_the_loop_that_scales_by_hand(name, by_keyword):
    """The closure's own backward runs inside the step, after the hook; its loss comes back to the caller."""
    scales = [1.0, 0.5, 3.0, 0.25]
    governed, plain = make_model(), make_model()
    optimizer, reference = make_optimizer(name, governed), make_optimizer(name, plain)
    governor = Governor(optimizer, Scripted(*[Action(lr_scale=s) for s in scales]), authority=WIDE)
    for step, s in enumerate(scales):

        def closure(step=step):
            return backward(governed, step)

        returned = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
        assert torch.equal(returned, backward(plain, step))
        step_by_hand(reference, s)
    assert same_bits(bits(governed, optimizer), bits(plain, reference))
    assert governor.summary()["faults"] == {}


@pytest.mark.parametrize("name", CLOSURES)
def test_a_skipped_step_with_a_closure_moves_no_weight(name):
    """Skipping is decided before the closure runs; the gradients that it brings must not move anything either."""
    model = make_model()
    optimizer = make_optimizer(name, model)
    governor = Governor(optimizer, Scripted(Action(), Action(directive=Directive.SKIP)), authority=WIDE)
    optimizer.step(lambda: backward(model, 0))
    before = bits(model, optimizer)
    returned = optimizer.step(lambda: backward(model, 1))
    assert same_bits(bits(model, optimizer), before)
    assert torch.equal(returned, backward(model, 1))
    optimizer.step(lambda: backward(model, 2))
    assert not same_bits(model.state_dict(), before[0])
    assert governor.summary()["skips"] == 1
    assert governor.summary()["faults"] == {}


# ---- what wants other parameters or gradients


def test_sparse_adam_is_governed_as_by_hand():
    def make():
        torch.manual_seed(3)
        table = torch.nn.Embedding(20, 4, sparse=True)
        return table, torch.optim.SparseAdam(table.parameters(), lr=0.01)

    scales = [1.0, 0.5, 2.0, 4.0]
    (governed, optimizer), (plain, reference) = make(), make()
    governor = Governor(optimizer, Scripted(*[Action(lr_scale=s) for s in scales]), authority=WIDE)
    for step, s in enumerate(scales):
        for table in (governed, plain):
            table.zero_grad()
            table(torch.tensor([step, 3, 3, 7])).square().sum().backward()
        optimizer.step()
        step_by_hand(reference, s)
    assert same_bits(bits(governed, optimizer), bits(plain, reference))
    assert governor.summary()["faults"] == {}


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_a_differentiable_step_keeps_its_graph(cls):
    """Meta-learning: the derivative of the loss after the step with respect to the weights before it."""

    def derivative(governed, s):
        start = torch.linspace(-1, 1, 6).requires_grad_()
        weights = start.clone()
        weights.retain_grad()
        optimizer = cls([weights], lr=0.1 if governed else 0.1 * s, weight_decay=0.5, differentiable=True)
        if governed:
            Governor(optimizer, Scripted(Action(lr_scale=s)), authority=WIDE)
        weights.grad = torch.linspace(0.1, 0.6, 6)
        optimizer.step()
        return torch.autograd.grad(weights.square().sum(), start)[0]

    assert torch.equal(derivative(True, 3.0), derivative(False, 3.0))
    assert not torch.equal(derivative(True, 3.0), derivative(True, 1.0))
