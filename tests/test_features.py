"""The feature vector: finite and bounded whatever is measured, the same in a batch as alone, free of scale."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lbw_rl import FEATURES, SIGNALS
from lbw_rl.features import _DEFINITIONS, FEATURE_LIMIT, FEATURE_SCHEMA, FeatureTracker

RUNS = 3
SEQUENCES = st.lists(
    st.dictionaries(st.sampled_from(list(SIGNALS)), arrays(np.float64, RUNS, elements=st.floats())), max_size=6
)


def typical(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """Signals of `n` runs, one in ten not measured."""
    signals = {name: np.exp(rng.normal(size=n)) for name in SIGNALS}
    for values in signals.values():
        values[rng.random(n) < 0.1] = np.nan
    return signals


def test_schema_names_every_feature_once_with_its_definition():
    assert FEATURE_SCHEMA == 3
    assert list(FEATURES) == list(_DEFINITIONS)
    assert all(FEATURES.values())
    assert not {"learning_rate", "weight_rms", "step", "step_seconds"} & set(FEATURES)


@given(SEQUENCES)
def test_features_and_state_are_finite_and_bounded_for_any_telemetry(sequence):
    tracker = FeatureTracker(RUNS, 100)
    for signals in sequence:
        features = tracker(signals)
        assert features.shape == (RUNS, len(FEATURES))
        assert np.isfinite(features).all()
        assert (np.abs(features) <= FEATURE_LIMIT).all()
        assert ((tracker.clipped >= 0) & (tracker.clipped <= 1)).all()
        for values in tracker.state_dict().values():
            assert all(x is None or math.isfinite(x) for x in values)


@given(SEQUENCES)
def test_what_is_not_finite_is_as_good_as_absent(sequence):
    with_gaps, dirty = FeatureTracker(RUNS, 100), FeatureTracker(RUNS, 100)
    for signals in sequence:
        gaps = {k: np.where(np.isfinite(v), v, np.nan) for k, v in signals.items()}
        assert np.array_equal(with_gaps(gaps), dirty(signals))


def test_nothing_measured_reads_zero():
    assert not FeatureTracker(2, 100)({}).any()


def test_analytic_values_of_one_healthy_decision():
    tracker = FeatureTracker(1, 400, 250_000)
    first = {"weight_rms": 0.02, "grad_entropy_direction": 0.989}
    tracker({"loss": 4.0, "learning_rate": 2e-3, "grad_norm": 1.0, "update_ratio": 0.01, **first})
    row = tracker(
        {
            "progress": 0.75,
            "learning_rate": 1e-3,
            "lr_scale": 10.0,
            "momentum_scale": 0.5,
            "loss": 2.0,
            "nonfinite": 0.0,
            "grad_norm": math.e,
            "grad_entropy": 0.6,
            "grad_cosine": 0.25,
            "update_ratio": 0.035,
            "surprise": math.e**2,
            "weight_rms": 0.02 * math.e,
            "grad_entropy_element": 0.8,
            "grad_entropy_direction": 0.5,
            "gpu_utilization": 0.9,
        }
    )[0]
    value = dict(zip(FEATURES, row))
    fast_loss = 4.0 + 0.3 * (2.0 - 4.0)
    expected = {
        "progress": 0.5,
        "lr_scale": 1.0,
        "momentum_scale": -1.0,
        "schedule": 0.0,
        "displacement": 0.0,  # 0.035 · sqrt(400) = 0.7
        "update_ratio_trend": math.log(3.5),
        "weight_growth": 2.0,
        "loss_level": 2 * math.log(fast_loss / 4.0) + 1,
        "loss_trend": -FEATURE_LIMIT,  # the loss has not deviated before
        "loss_jump": -FEATURE_LIMIT,
        "loss_noise": -FEATURE_LIMIT,
        "grad_norm_jump": 1.0,
        "grad_norm_level": 0.0,
        "steepness": 0.0,  # 1.0 · 0.02 · sqrt(250,000) = 10 nats; the newest norm enters afterwards
        "grad_entropy": 0.4,
        "grad_entropy_element": 0.2,
        "grad_agreement": math.log(0.012 / 0.01) / 2,
        "grad_cosine": 0.5,
        "surprise": 1.0,
        "nonfinite": 0.0,
        "gpu_utilization": 0.8,
        "gpu_memory": 0.0,
        "gpu_power": 0.0,
    }
    assert value == pytest.approx(expected)
    assert tracker.clipped[0] == pytest.approx(3 / len(FEATURES))


def test_a_batch_equals_separate_runs():
    n, rng = 5, np.random.default_rng(0)
    horizons = rng.integers(10, 500, n).astype(float)
    batch, alone = FeatureTracker(n, horizons), [FeatureTracker(1, h) for h in horizons]
    for _ in range(20):
        signals = typical(rng, n)
        together = batch(signals)
        for i, tracker in enumerate(alone):
            assert np.array_equal(tracker({k: v[i : i + 1] for k, v in signals.items()})[0], together[i])


def test_a_plain_number_is_a_batch_of_one():
    rng = np.random.default_rng(1)
    arrays_, numbers = FeatureTracker(1, 100), FeatureTracker(1, 100)
    for _ in range(5):
        signals = typical(rng, 1)
        assert np.array_equal(arrays_(signals), numbers({k: float(v[0]) for k, v in signals.items()}))


def test_reset_of_a_mask_starts_those_runs_anew_and_leaves_the_others():
    rng = np.random.default_rng(2)
    tracker, untouched, fresh = FeatureTracker(3, 100), FeatureTracker(3, 100), FeatureTracker(3, 400)
    for _ in range(5):
        signals = typical(rng, 3)
        tracker(signals), untouched(signals)
    mask = np.array([False, True, False])
    tracker.reset(mask, np.array([1.0, 400.0, 1.0]))
    for _ in range(5):
        signals = typical(rng, 3)
        expected = np.where(mask[:, None], fresh(signals), untouched(signals))
        assert np.array_equal(tracker(signals), expected)


def test_the_tracker_keeps_no_hold_on_the_callers_arrays():
    tracker, twin = FeatureTracker(2, 100), FeatureTracker(2, 100)
    signals = typical(np.random.default_rng(3), 2)
    first = tracker(signals)
    kept = first.copy()
    twin({k: v.copy() for k, v in signals.items()})
    later = typical(np.random.default_rng(4), 2)
    for values in signals.values():
        values[:] = 1e9
    assert np.array_equal(tracker(later), twin(later))
    assert np.array_equal(first, kept)


@given(SEQUENCES, SEQUENCES)
def test_state_round_trip(before, after):
    original, restored = FeatureTracker(RUNS, 100), FeatureTracker(RUNS, 100)
    for signals in before:
        original(signals)
    restored.load_state_dict(json.loads(json.dumps(original.state_dict(), allow_nan=False)))
    assert restored.state_dict() == original.state_dict()
    for signals in after:
        assert np.array_equal(restored(signals), original(signals))


@pytest.mark.parametrize("signal", ["learning_rate", "grad_norm", "tokens_per_second", "step_seconds", "weight_rms"])
def test_what_identifies_the_size_of_a_task_does_not_show(signal):
    rng = np.random.default_rng(6)
    small, large = (
        FeatureTracker(2, 100),
        FeatureTracker(2, 100),
    )  # without the number of weights, which makes up for it
    for _ in range(10):
        signals = typical(rng, 2)
        scaled = {**signals, signal: signals[signal] * 1e-4}
        assert np.allclose(small(signals), large(scaled), rtol=0, atol=1e-9)


def test_steepness_is_that_of_the_function_whatever_scale_its_weights_have():
    """Weights c times as large under a gradient 1/c times as large are the same model, and so are four copies of it."""
    once, scaled, repeated = FeatureTracker(1, 100, 100), FeatureTracker(1, 100, 100), FeatureTracker(1, 100, 400)
    index = list(FEATURES).index("steepness")
    for tracker, norm, rms in ((once, 2.0, 0.5), (scaled, 0.2, 5.0), (repeated, 2.0 / 2, 0.5)):
        for _ in range(3):
            value = tracker({"grad_norm": norm, "weight_rms": rms})[0, index]
        assert value == pytest.approx(math.log(2.0 * 0.5 * math.sqrt(100) / 10))
    assert FeatureTracker(1, 100)({"grad_norm": 2.0, "weight_rms": 0.5})[0, index] == 0.0


def test_a_jump_is_measured_against_the_past_alone():
    tracker = FeatureTracker(1, None)
    index = list(FEATURES).index("grad_norm_jump")
    for _ in range(10):
        tracker({"grad_norm": 1.0})
    assert tracker({"grad_norm": 8.0})[0, index] == pytest.approx(math.log(8))
