"""The entropy estimators: analytic answers, the float64 reference, bounds, and what a real gradient does to each."""

import math

import entropy_reference as reference
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from measuring import Measuring

from lbw_rl.entropy import (
    ENTROPY_BINS,
    ESTIMATORS,
    Sampled,
    direction_entropy,
    element_entropy,
    histogram_entropy,
    softmax_entropy,
    tensor_entropy,
)
from lbw_rl.signals import SIGNALS

EACH = pytest.mark.parametrize("name", ESTIMATORS)
GRADIENTS = arrays(np.float32, st.integers(1, 60), elements=st.floats(-100, 100, width=32))


def f32(*values):
    return np.array(values, np.float32)


def sampled(gradient, mean=None, parts=2):
    starts = np.unique(np.linspace(0, gradient.size, parts, endpoint=False).astype(np.intp))
    return Sampled(gradient, np.ones_like(gradient) if mean is None else mean, starts, np.ones(starts.size, np.float32))


def estimate(name, s):
    with np.errstate(all="ignore"):
        return ESTIMATORS[name][1](s)


# ---- analytic answers


@pytest.mark.parametrize("count", [2, 3, 64, 1000])
def test_equal_magnitudes_are_one_octave_and_all_elements(count):
    g = np.where(np.arange(count) % 2, -0.3, 0.3).astype(np.float32)
    assert histogram_entropy(g) == 0.0
    assert element_entropy(g) == pytest.approx(1.0)
    assert softmax_entropy(g) == pytest.approx(1.0)


@pytest.mark.parametrize("octaves", range(1, 28))
def test_magnitudes_uniform_over_k_octaves_have_log_k(octaves):
    # 27 is the most there can be: what lies above the third octave over the rms would itself have raised the rms.
    g = 2.0 ** -np.arange(octaves, dtype=np.float32)
    assert histogram_entropy(g) == pytest.approx(math.log(octaves) / math.log(ENTROPY_BINS), abs=1e-6)


@pytest.mark.parametrize(("used", "count"), [(1, 8), (2, 8), (4, 8), (8, 8), (10, 4096)])
def test_energy_on_k_of_n_elements_has_log_k_over_log_n(used, count):
    g = np.zeros(count, np.float32)
    g[:used] = 5.0
    assert element_entropy(g) == pytest.approx(math.log(used) / math.log(count), abs=1e-6)


def test_tensors_count_by_the_elements_that_their_sample_stands_for():
    g, starts = f32(1, 1, 1, 1, 1, 1), np.array([0, 2], np.intp)
    equal = tensor_entropy(g, starts, f32(2, 1))  # 2 · 2 against 4 · 1
    assert equal == pytest.approx(1.0)
    assert tensor_entropy(g, starts, f32(1, 1)) == pytest.approx(reference.shannon([1 / 3, 2 / 3]) / math.log(2))
    assert tensor_entropy(f32(1, 0, 0, 0), np.array([0, 2], np.intp), f32(1, 1)) == 0.0
    assert math.isnan(tensor_entropy(g, np.array([0], np.intp), f32(1)))


@pytest.mark.parametrize(
    ("gradient", "entropy"),
    [
        ((1, 1, 1, 1), 0.0),
        ((-1, -1, -1, -1), 0.0),
        ((1, -1, 1, -1), 1.0),
        ((1, 1, 1, -1), 0.8112781),
        ((3, -1, 0, 0), 0.4689956),
    ],
)
def test_direction_is_the_binary_entropy_of_the_energy_that_keeps_its_sign(gradient, entropy):
    assert direction_entropy(f32(*gradient), f32(1, 2, 3, 4)) == pytest.approx(entropy, abs=1e-6)


def test_softmax_sees_nothing_in_a_gradient_of_real_size_but_does_in_a_scaled_one():
    g = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    few = np.where(np.arange(4096) < 40, g, 0).astype(np.float32)
    assert abs(softmax_entropy(g * 1e-3) - softmax_entropy(few * 1e-3)) < 1e-4  # blind, by four digits
    assert softmax_entropy(few * 65536) < 0.1  # and a gradient left scaled would read as another run


# ---- the reference, the bounds, invariance


@given(GRADIENTS, st.integers(0, 2**32 - 1))
def test_every_estimator_equals_its_float64_reference(values, seed):
    if not np.abs(values).max() > 1e-30:
        return
    g, mean = values.astype(np.float64), np.random.default_rng(seed).normal(size=values.size).astype(np.float32)
    assert softmax_entropy(values) == pytest.approx(reference.softmax(g) if g.size > 1 else 0.0, abs=1e-5)
    assert element_entropy(values) == pytest.approx(reference.element(g) if g.size > 1 else 0.0, abs=1e-5)
    signed = g[g != 0].size == g.size
    if signed:
        assert direction_entropy(values, mean) == pytest.approx(reference.direction(g, mean), abs=1e-5)
    s = sampled(values, parts=4)
    if s.starts.size > 1:
        assert estimate("tensor", s) == pytest.approx(reference.tensor(np.split(g, s.starts[1:])), abs=1e-5)


@EACH
@given(g=GRADIENTS)
def test_every_estimator_lies_between_zero_and_one_or_says_that_it_does_not_know(name, g):
    value = estimate(name, sampled(g))
    assert 0.0 <= value <= 1.0 or math.isnan(value)
    assert isinstance(value, float)


@pytest.mark.parametrize("name", [e for e in ESTIMATORS if e != "softmax"])
@given(
    g=arrays(np.float32, st.integers(2, 50), elements=st.floats(0.0625, 64, width=32)), exponent=st.integers(-60, 60)
)
def test_a_multiple_of_the_gradient_has_the_same_entropy(name, g, exponent):
    g = np.where(np.arange(g.size) % 3, g, -g)
    assert estimate(name, sampled(g * np.float32(2.0**exponent))) == pytest.approx(estimate(name, sampled(g)), abs=1e-6)


@EACH
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_has_no_entropy(name, poison):
    assert math.isnan(estimate(name, sampled(f32(1, poison, 2, 3))))


@EACH
def test_zeros_alone_have_no_spread_or_none_that_is_known(name):
    expected = {"softmax": 1.0, "direction": math.nan}.get(name, 0.0)
    assert estimate(name, sampled(np.zeros(10, np.float32))) == pytest.approx(expected, nan_ok=True)


def test_every_estimator_has_its_row_in_the_table():
    signals = [signal for signal, _ in ESTIMATORS.values()]
    assert len(set(signals)) == len(signals)
    assert all((SIGNALS[s].low, SIGNALS[s].high, SIGNALS[s].source) == (0, 1, "gradient") for s in signals)


# ---- on a real model, through the probe


def gradients(model):
    return [p.grad.double().numpy() for p in model.parameters() if p.ndim >= 2]


def test_the_probe_measures_what_the_reference_says_of_a_real_language_model(make_lm, tokens):
    model = make_lm()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    probe = Measuring(optimizer, sample=10**6)  # every element
    mean = None
    for step in range(4):
        optimizer.zero_grad()
        x = tokens(step)
        model(input_ids=x, labels=x).loss.backward()
        values = probe.measure()
        own = gradients(model)
        g = np.concatenate([t.ravel() for t in own])
        assert values["grad_entropy"] == pytest.approx(reference.histogram(g), abs=1e-3)  # an element at a bin's edge
        assert values["grad_entropy_softmax"] == pytest.approx(reference.softmax(g), abs=1e-6)
        assert values["grad_entropy_element"] == pytest.approx(reference.element(g), abs=1e-5)
        assert values["grad_entropy_tensor"] == pytest.approx(reference.tensor(own), abs=1e-5)
        if mean is None:
            assert "grad_entropy_direction" not in values
        else:
            g32, m32 = g.astype(np.float32), mean.astype(np.float32)
            agreeing = np.where(np.signbit(g32) == np.signbit(m32), g, 0.0)
            q = np.sum(agreeing**2) / np.sum(g**2)
            assert values["grad_entropy_direction"] == pytest.approx(
                reference.shannon([q, 1 - q]) / np.log(2), abs=1e-4
            )
        mean = g if mean is None else mean + 0.1 * (g - mean)
        probe.before_step()
        optimizer.step()
        probe.after_step()


def test_groups_are_measured_one_by_one_where_a_controller_asks(make_lm, tokens):
    from lbw_rl import split_parameter_groups
    from lbw_rl.probe import Probe

    model = make_lm()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    split_parameter_groups(optimizer)
    x = tokens(0)
    model(input_ids=x, labels=x).loss.backward()
    probe = Probe(optimizer, 10**6, group_entropy="element")
    packed = probe.pack(None, None, None)
    values = probe.group_entropies(packed.unpack(packed.values.numpy())["gradient"])
    assert len(values) == len(optimizer.param_groups)
    for group, value in zip(optimizer.param_groups, values):
        (p,) = group["params"]
        if p.ndim < 2:
            assert math.isnan(value)
        else:
            assert value == pytest.approx(reference.element(p.grad.double().numpy().ravel()), abs=1e-5)
    assert Probe(optimizer, 10**6).group_entropies(packed.unpack(packed.values.numpy())["gradient"]) == ()


def test_a_group_that_took_no_part_in_a_step_has_no_entropy():
    from lbw_rl.probe import Probe

    used, idle = (torch.nn.Parameter(torch.ones(8, 8)) for _ in range(2))
    used.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    probe = Probe(torch.optim.SGD([{"params": [used]}, {"params": [idle]}], lr=0.1), group_entropy="element")
    packed = probe.pack(None, None, None)
    first, second = probe.group_entropies(packed.unpack(packed.values.numpy())["gradient"])
    assert 0.0 < first < 1.0
    assert math.isnan(second)


def test_a_poisoned_gradient_never_enters_the_mean_that_directions_are_compared_with(make_mlp):
    model = make_mlp()
    probe = Measuring(torch.optim.SGD(model.parameters(), lr=0.0))

    def backward(seed):
        model.zero_grad()
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))).square().mean().backward()

    backward(0)
    probe.measure()
    backward(1)
    model[0].weight.grad[0, 0] = math.nan
    assert "grad_entropy_direction" not in probe.measure()
    backward(0)
    assert probe.measure()["grad_entropy_direction"] == 0.0  # the same gradient again: it goes straight on


def test_a_mean_that_overflows_starts_anew():
    p = torch.nn.Parameter(torch.ones(8, 8))
    probe = Measuring(torch.optim.SGD([p], lr=0.0))
    for value in (3e38, -3e38, -1.0, -1.0):
        p.grad = torch.full((8, 8), value)
        signals = probe.measure()
    assert signals["grad_entropy_direction"] == 0.0
