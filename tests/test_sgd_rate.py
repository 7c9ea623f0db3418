"""The rate of SGD, measured as SWATS does: γ of one Adam step, and its mean Λ."""

import json
import math

import numpy as np
import pytest
import torch
from hand_over_runs import (
    ADAMS,
    PERMITTED,
    Asks,
    backward,
    make_adam,
    make_model,
    matrices,
    train,
    two_groups,
)
from hypothesis import given
from hypothesis import strategies as st

from lbw_rl import Action, Directive, Governor, Telemetry
from lbw_rl.sgd_rate import HALF_LIFE, TOLERANCE, SgdRate, projected_rate

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
