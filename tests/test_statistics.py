"""Exponentially forgetting statistics: analytic half-life, and no value that is not finite gets in."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbw_rl.statistics import ExponentialMean

# Where the difference of two values is still a float; signals come from float32.
FINITE = st.floats(-1e300, 1e300)
ANY = st.one_of(FINITE, st.sampled_from([math.nan, math.inf, -math.inf]))


@given(st.lists(ANY, max_size=40), st.floats(0.1, 100))
def test_a_non_finite_value_never_enters(values, half_life):
    dirty, clean = ExponentialMean(half_life), ExponentialMean(half_life)
    for value in values:
        dirty.update(value)
    for value in filter(math.isfinite, values):
        clean.update(value)
    assert dirty.rejected == len(values) - clean.count
    assert {**dirty.state_dict(), "rejected": 0} == clean.state_dict()
    if clean.count:
        assert math.isfinite(dirty.mean)
        assert math.isfinite(dirty.deviation)
    else:
        assert math.isnan(dirty.mean)


@pytest.mark.parametrize("half_life", [1, 4, 20, 77])
def test_a_value_has_half_its_weight_after_one_half_life(half_life):
    mean = ExponentialMean(half_life)
    for _ in range(50 * half_life):
        mean.update(0.0)
    at_first = mean.update(1.0)
    for _ in range(half_life):
        later = mean.update(0.0)
    assert at_first == pytest.approx(1 - 0.5 ** (1 / half_life))
    assert later == pytest.approx(at_first / 2)


def test_the_first_values_count_equally():
    mean = ExponentialMean(half_life=1000)
    for value in (1.0, 2.0, 6.0):
        mean.update(value)
    assert mean.mean == pytest.approx(3.0)


@given(st.floats(-1e6, 1e6), st.integers(1, 50))
def test_a_constant_is_its_own_mean_and_deviates_by_nothing(value, count):
    mean = ExponentialMean(7)
    for _ in range(count):
        mean.update(value)
    assert (mean.mean, mean.deviation) == (value, 0.0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_the_mean_lies_within_the_values(values):
    mean = ExponentialMean(3)
    for value in values:
        mean.update(value)
    slack = 1e-9 * max(map(abs, values))
    assert min(values) - slack <= mean.mean <= max(values) + slack
    assert 0 <= mean.deviation <= max(values) - min(values) + slack


def test_score_counts_mean_absolute_deviations_above_the_mean():
    mean = ExponentialMean(1e9)
    for value in (0.0, 2.0):
        mean.update(value)
    assert (mean.mean, mean.deviation) == (1.0, 1.0)
    assert mean.score(4.0) == 3.0
    assert math.isnan(ExponentialMean(1).score(4.0))


@pytest.mark.parametrize("half_life", [0, -1, math.nan])
def test_half_life_must_be_positive(half_life):
    with pytest.raises(ValueError, match="half_life"):
        ExponentialMean(half_life)


@given(st.lists(ANY, max_size=20), st.lists(ANY, max_size=20))
def test_state_round_trip(before, after):
    original, restored = ExponentialMean(5), ExponentialMean(5)
    for value in before:
        original.update(value)
    restored.load_state_dict(json.loads(json.dumps(original.state_dict(), allow_nan=False)))
    for value in after:
        original.update(value)
        restored.update(value)
    assert restored.state_dict() == original.state_dict()
