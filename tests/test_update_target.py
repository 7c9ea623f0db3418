"""The set-point of LBW-Guard against its formula, term by term."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbw_rl import Context, Telemetry
from lbw_rl.json_state import from_json, to_json
from lbw_rl.update_target import DISPLACEMENT, STEEPNESS, UpdateTarget, shorter_momentum

NAN = math.nan


def target(**context):
    return UpdateTarget(Context(**{"total_steps": 400, "weights": 10_000, "momentum": 0.9, **context}), 2.0, 10.0)


def telemetry(step=100, **signals):
    usual = {"progress": step / 400, "learning_rate": 1e-3, "momentum_scale": 1.0, "grad_norm": 1.0, "weight_rms": 0.02}
    return Telemetry(**{"step": step, **usual, **signals})


def seen(subject, n=30, **signals):
    for _ in range(n):
        subject.observe(telemetry(**signals))
    return subject


def test_displacement_over_the_root_of_horizon_and_momentum():
    """S = 1 · 0.02 · 100 = 2 nats is below 10: nothing else binds. 2/sqrt(400 · 10) · sqrt(3/4)."""
    assert seen(target()).ratio(telemetry()) == pytest.approx(2 / math.sqrt(400 * 10) * math.sqrt(0.75))


def test_it_counts_the_momentum_that_was_executed():
    shortened = seen(target()).ratio(telemetry(momentum_scale=0.5))
    assert shortened == pytest.approx(2 / math.sqrt(400 * 5) * math.sqrt(0.75))
    # Cut to less than one step there is no average left, and none without momentum.
    for subject, scale in ((target(), 0.01), (target(momentum=0.0), 1.0)):
        assert seen(subject).ratio(telemetry(momentum_scale=scale)) == pytest.approx(
            2 / math.sqrt(400) * math.sqrt(0.75)
        )


def test_a_momentum_that_a_schedule_moves_counts_as_it_is_now():
    """OneCycleLR's, on its way from 0.95 to 0.85; what no momentum can be is passed over."""
    for momentum, averaged in ((0.95, 20), (0.85, 1 / 0.15), (0.0, 1), (NAN, 10), (1.0, 10), (-3.0, 10)):
        moved = seen(target()).ratio(telemetry(momentum=momentum))
        assert moved == pytest.approx(2 / math.sqrt(400 * averaged) * math.sqrt(0.75))


def test_a_momentum_that_is_not_known_counts_as_the_one_that_the_constants_were_chosen_with():
    for scale in (0.5, 1.0):
        unknown = seen(target(momentum=None)).ratio(telemetry(momentum_scale=scale))
        assert unknown == pytest.approx(2 / math.sqrt(400 * 5) * math.sqrt(0.75))


def test_sgd_has_half_the_ratio_of_adam_at_the_shortened_momentum_whatever_its_own():
    for momentum in (0.0, 0.9, None):
        plain = seen(target(momentum=momentum, normalised=False)).ratio(telemetry(momentum_scale=0.5))
        assert plain == pytest.approx(2 / math.sqrt(400 * 20) * math.sqrt(0.75))


@pytest.mark.parametrize(("weights", "weight_rms", "grad_norm"), [(1_000_000, 0.02, 1.0), (10_000, 0.1, 2.0)])
def test_a_steep_model_takes_steps_in_inverse_proportion(weights, weight_rms, grad_norm):
    """S = 20 nats, twice what is granted in full."""
    subject = seen(target(weights=weights), weight_rms=weight_rms, grad_norm=grad_norm)
    assert subject.steepness() == pytest.approx(20)
    assert subject.ratio(telemetry()) == pytest.approx(0.5 * 2 / math.sqrt(400 * 10) * math.sqrt(0.75))


def test_steepness_is_that_of_the_weights_at_the_start_and_of_the_largest_gradients():
    subject = seen(target(), weight_rms=0.02)
    seen(subject, weight_rms=0.5, grad_norm=0.1, n=1)
    assert subject.steepness() == pytest.approx(2, rel=0.01)
    seen(subject, grad_norm=0.1, n=200)
    assert subject.steepness() == pytest.approx(2 * 0.25, rel=0.03)  # forgotten with a half-life of 100
    seen(subject, grad_norm=3.0, n=60)
    assert subject.steepness() == pytest.approx(6, rel=0.01)


def test_of_adapters_the_first_order_loss_change_alone_is_held():
    """r · ‖w‖ · ‖g‖ = 0.55 · displacement · steepness / sqrt(T · H), whatever the factors have grown to."""
    for rms in (0.015, 0.02, 0.4):
        subject = seen(target(low_rank=True), weight_rms=0.01, n=5)
        seen(subject, weight_rms=rms)
        change = subject.ratio(telemetry()) * rms * 100 * 1.0
        assert change == pytest.approx(0.55 * 2 * 10 / math.sqrt(400 * 10) * math.sqrt(0.75))


def test_adapters_whose_gradient_vanishes_take_no_steps_without_end():
    for norm in (1e-2, 1e-6, 1e-300):
        subject = seen(target(low_rank=True), weight_rms=0.01, grad_norm=norm, n=5)
        assert subject.ratio(telemetry(weight_rms=0.01)) == pytest.approx(4 * 2 / math.sqrt(400 * 10) * math.sqrt(0.75))


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_it_keeps_an_annealing_that_the_user_asked_for_and_adds_none_to_it(name):
    from lbw_rl.envs.optim import schedule_multiplier
    from lbw_rl.envs.recipe import ScheduleSpec

    multiplier = schedule_multiplier(ScheduleSpec(name=name, warmup_steps=20), 400)
    subject = seen(target())
    for step in range(400):
        ratio = subject.ratio(telemetry(step=step, learning_rate=5.0 * multiplier(step)))
        asked = multiplier(step) if step >= 20 else 1.0  # a warmup is no annealing
        ramp = min(1.0, (step + 1) / 10)
        assert ratio == pytest.approx(2 / math.sqrt(4000) * ramp * min(math.sqrt(1 - step / 400), asked))


def test_without_a_horizon_it_follows_the_schedule_alone():
    subject = seen(target(total_steps=None))
    assert subject.ratio(telemetry(progress=NAN)) == pytest.approx(2 / math.sqrt(1000 * 10))
    assert subject.ratio(telemetry(progress=NAN, learning_rate=2.5e-4)) == pytest.approx(2 / math.sqrt(1000 * 10) / 4)


def test_the_first_step_of_a_wrong_rate_is_cut_before_anything_is_measured():
    """As if each weight of 0.02 moved by the rate: r* · 0.02 / η, and never more than the base rate."""
    subject = target()
    expected = 0.1 * 2 / math.sqrt(4000) * 0.02
    assert subject.first_scale(telemetry(step=0, learning_rate=1.0)) == pytest.approx(expected)
    for rate in (1e-9, 0.0, NAN):
        assert target().first_scale(telemetry(step=0, learning_rate=rate)) == 1.0


ODD = st.one_of(st.floats(0, 1e30), st.sampled_from([NAN, 0.0]))


@given(st.lists(st.fixed_dictionaries({"grad_norm": ODD, "weight_rms": ODD, "learning_rate": ODD}), max_size=12))
def test_whatever_is_measured_the_target_lies_between_0_and_the_whole_displacement(records):
    subject = target()
    for record in records:
        subject.observe(telemetry(**record))
        assert 0 <= subject.ratio(telemetry(**record)) <= 2 / math.sqrt(400 * 10)


@pytest.mark.parametrize("low_rank", [False, True])
def test_a_restored_target_goes_on_as_if_nothing_had_happened(low_rank):
    one, other = target(low_rank=low_rank), target(low_rank=low_rank)
    other.load_state_dict(from_json(to_json(one.state_dict())))  # of a run that has measured nothing
    seen(one, n=7, grad_norm=30.0, learning_rate=2e-3)
    other.load_state_dict(from_json(to_json(one.state_dict())))
    for norm in (1.0, 50.0, NAN):
        t = telemetry(grad_norm=norm, weight_rms=0.03)
        one.observe(t)
        other.observe(t)
        assert one.ratio(t) == other.ratio(t)


def test_momentum_is_shortened_and_never_lengthened():
    assert shorter_momentum(0.9, 5.0) == pytest.approx(0.5)  # 1 − β' = (1 − β)/scale: 0.9 → 0.8
    assert shorter_momentum(0.5, 5.0) == 1.0
    assert shorter_momentum(0.0, 5.0) == 1.0
    assert shorter_momentum(None, 5.0) == 1.0


def test_mini_qwen2_is_granted_the_whole_displacement():
    """The constants belong together: 166,000 weights of 0.02 and a gradient norm of 1 are below the steepness."""
    subject = UpdateTarget(Context(total_steps=300, weights=166_000, momentum=0.8), DISPLACEMENT, STEEPNESS)
    seen(subject, weight_rms=0.02, grad_norm=1.0)
    full = DISPLACEMENT / math.sqrt(300 * 5)
    assert subject.ratio(telemetry(step=10, progress=0.0)) == pytest.approx(full)
