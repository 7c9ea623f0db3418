"""The authority holds whatever a controller says: bounds, slew limit, budgets, suspension."""

import json
import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbw_rl import Action, Authority, Directive
from lbw_rl.action import NEUTRAL, log_interpolate, log_position
from lbw_rl.enforcer import Enforcer

LOW, HIGH = st.floats(1e-4, 1.0), st.floats(1.0, 1e4)
AUTHORITIES = st.builds(
    Authority,
    lr_scale=st.tuples(LOW, HIGH),
    momentum_scale=st.tuples(LOW, HIGH),
    slew_up=st.floats(1.001, 10),
    max_skips=st.integers(0, 3),
    skip_window=st.integers(1, 10),
    max_rollbacks=st.integers(0, 3),
    rollback_cooldown=st.integers(0, 10),
    suspend_after=st.integers(1, 20),
    hand_over=st.booleans(),
)
HOSTILE_SCALES = st.one_of(
    st.floats(),
    st.integers(-(10**400), 10**400),
    st.fractions(),
    st.floats(width=32).map(np.float32),
    st.booleans(),
    st.sampled_from([None, "2.0", [1.0], complex(1, 1), np.array([1.0, 2.0]), Action]),
)
HOSTILE_ACTIONS = st.builds(
    Action,
    lr_scale=HOSTILE_SCALES,
    momentum_scale=HOSTILE_SCALES,
    directive=st.sampled_from([*Directive, *Directive, "skip", None]),
    hand_over=st.sampled_from([False, True, True, 1, "yes", None]),
    regime=st.sampled_from(["steady", "steady", None, ["unhashable"]]),
    evidence=st.sampled_from([{}, {}, None, 3.0]),
)
SANE_ACTIONS = st.builds(
    Action,
    lr_scale=st.floats(0, 1e6),
    momentum_scale=st.floats(0, 1e6),
    directive=st.sampled_from(list(Directive)),
    hand_over=st.booleans(),
)
PROPOSALS = st.one_of(SANE_ACTIONS, HOSTILE_ACTIONS, st.sampled_from([None, 1.0, "faster", {"lr_scale": 2}]))


def within(bounds, value):
    return bounds[0] <= value <= bounds[1]


# ---- declaration


def test_the_default_is_safe_for_a_large_run():
    authority = Authority()
    assert authority.lr_scale[1] <= 1.25
    assert authority.momentum_scale[1] <= 1.25
    assert authority.max_rollbacks == 0


@pytest.mark.parametrize("field", ["lr_scale", "momentum_scale"])
@pytest.mark.parametrize(
    "bounds", [(0.0, 1.0), (-1.0, 2.0), (1.5, 2.0), (0.5, 0.9), (2.0, 0.5), (math.nan, 1.0), (0.5, math.inf)]
)
def test_a_range_that_does_not_hold_one_is_refused(field, bounds):
    with pytest.raises(ValueError, match=rf"{field}[\s\S]*0 < low <= 1 <= high < inf"):
        Authority(**{field: bounds})


@pytest.mark.parametrize(
    ("field", "value"), [("slew_up", 1.0), ("max_skips", -1), ("skip_window", 0), ("suspend_after", 0), ("lr_max", 1)]
)
def test_a_field_out_of_range_or_unknown_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        Authority(**{field: value})


# ---- the bijection between [-1, 1] and the bounds


@given(st.floats(), LOW, HIGH)
def test_log_interpolation_never_leaves_the_bounds_and_nan_stays_nan(unit, low, high):
    value = log_interpolate(unit, (low, high))
    assert math.isnan(value) if math.isnan(unit) else low <= value <= high


@given(st.floats(-1, 1), LOW, HIGH)
def test_log_position_inverts_log_interpolation(unit, low, high):
    if high / low > 1.01:
        assert log_position(log_interpolate(unit, (low, high)), (low, high)) == pytest.approx(unit, abs=1e-9)


def test_log_interpolation_at_the_ends_and_in_the_middle():
    bounds = (0.01, 100.0)
    assert log_interpolate(-1, bounds) == pytest.approx(0.01, rel=1e-15)
    assert log_interpolate(1, bounds) == pytest.approx(100.0, rel=1e-15)
    assert log_interpolate(0, bounds) == pytest.approx(1.0, rel=1e-15)
    assert log_position(1.0, (1.0, 1.0)) == 0.0


# ---- enforcement


@settings(max_examples=400)
@given(AUTHORITIES, st.lists(st.one_of(PROPOSALS, st.builds(RuntimeError)), max_size=40))
def test_nothing_that_a_controller_says_or_raises_leaves_the_authority(authority, proposals):
    enforcer = Enforcer(authority)
    last, skips, rollbacks = 1.0, [], []
    for decision, proposed in enumerate(proposals):
        if isinstance(proposed, RuntimeError):
            action = enforcer.rule(None, "RuntimeError: on fire").action
        else:
            action = enforcer.rule(proposed).action
        assert type(action.lr_scale) is type(action.momentum_scale) is float
        assert within(authority.lr_scale, action.lr_scale)
        assert within(authority.momentum_scale, action.momentum_scale)
        assert action.hand_over is False or (authority.hand_over and action.directive is Directive.PROCEED)
        assert action.lr_scale <= max(last, authority.lr_scale[0]) * authority.slew_up
        last = action.lr_scale
        if action.directive is Directive.SKIP:
            skips.append(decision)
        if action.directive is Directive.ROLLBACK:
            rollbacks.append(decision)
    for decision in skips:
        recent = [d for d in skips if decision - authority.skip_window < d <= decision]
        assert len(recent) <= authority.max_skips
    assert len(rollbacks) <= authority.max_rollbacks
    assert all(b - a >= authority.rollback_cooldown for a, b in pairwise(rollbacks))
    assert enforcer.faults <= authority.suspend_after


GROUPED = st.one_of(
    st.builds(
        Action,
        lr_scale=st.floats(0, 1e4),
        group_lr_scales=st.sampled_from([(), (1.0, 1.0), (100.0, 1.0), (1e-3, 1.0), (0.5, 2.0), (0.0, 1e4)]),
        directive=st.sampled_from([Directive.PROCEED, Directive.PROCEED, Directive.SKIP]),
    ),
    st.just(None),  # a fault
)


@given(AUTHORITIES, st.lists(GROUPED, max_size=30))
def test_no_group_s_whole_scale_leaves_the_range_or_rises_faster_than_the_slew_limit(authority, proposals):
    enforcer, before = Enforcer(authority), (1.0, 1.0)
    low, high = authority.lr_scale
    for proposed in proposals:
        action = enforcer.rule(proposed, groups=2).action
        if action.directive is not Directive.PROCEED:
            continue
        whole = tuple(action.lr_scale * g for g in action.group_lr_scales or (1.0, 1.0))
        for now, was in zip(whole, before, strict=True):
            assert low * (1 - 1e-9) <= now <= high * (1 + 1e-9)
            assert now <= max(was, low) * authority.slew_up * (1 + 1e-9)
        before = whole


def test_a_group_that_was_cut_comes_back_no_faster_when_the_action_has_no_groups_or_the_controller_fails():
    for after in (Action(), None):
        enforcer = Enforcer(Authority())
        enforcer.rule(Action(group_lr_scales=(0.01, 1.0)), groups=2)
        ruling = enforcer.rule(after, groups=2)
        assert ruling.action.group_lr_scales == pytest.approx((0.015, 1.0))
        assert any("slew limit" in reason for reason in ruling.reasons)
        for _ in range(20):
            action = enforcer.rule(Action(), groups=2).action
        assert action.group_lr_scales == ()


def test_a_state_of_wider_authority_is_held_to_this_one_s():
    held = Enforcer(Authority(lr_scale=(0.5, 1.0))).hold(Action(group_lr_scales=(100.0, 1e-3)), groups=2)
    assert held.group_lr_scales == (1.0, 0.5)


@given(AUTHORITIES, SANE_ACTIONS, st.floats(1e-4, 1e4))
def test_clipping_twice_changes_nothing_more(authority, action, previous):
    once, _ = authority.clip(action, previous)
    twice, reasons = authority.clip(once, previous)
    assert twice == once
    assert not reasons


def test_an_action_within_the_authority_passes_untouched():
    action = Action(lr_scale=0.5, momentum_scale=1.1)
    ruling = Enforcer(Authority()).rule(action)
    assert ruling.action is action
    assert ruling.reasons == ()


def test_a_cut_is_immediate_and_a_rise_is_slewed_with_the_reason():
    enforcer = Enforcer(Authority(lr_scale=(0.01, 100.0), slew_up=2.0))
    assert enforcer.rule(Action(lr_scale=0.02)).action.lr_scale == 0.02
    rise = enforcer.rule(Action(lr_scale=50.0))
    assert rise.action.lr_scale == 0.04
    assert "slew_up" in rise.reasons[0]


def test_numbers_of_other_libraries_become_plain_floats():
    action = Enforcer(Authority()).rule(Action(lr_scale=np.float32(0.5), momentum_scale=Fraction(3, 4))).action
    assert (action.lr_scale, action.momentum_scale) == (0.5, 0.75)
    assert type(action.lr_scale) is type(action.momentum_scale) is float


@pytest.mark.parametrize(
    ("proposed", "reason"),
    [
        (None, "NoneType, not an Action"),
        (Action(lr_scale=math.nan), "lr_scale is nan"),
        (Action(momentum_scale=-math.inf), "momentum_scale is -inf"),
        (Action(lr_scale=10**400), "lr_scale is 1000"),
        (Action(lr_scale=True), "lr_scale is True"),
        (Action(directive="skip"), "directive is 'skip'"),
        (Action(regime=["a"]), "regime is"),
        (Action(evidence=None), "evidence is None"),
    ],
)
def test_a_malformed_action_is_a_fault_with_its_reason(proposed, reason):
    enforcer = Enforcer(Authority())
    ruling = enforcer.rule(proposed)
    assert enforcer.faults == 1
    assert ruling.action.regime == "fault"
    assert reason in ruling.reasons[0]


def test_after_n_faults_the_controller_is_suspended_and_the_scale_returns_to_one_at_the_slew_limit():
    enforcer = Enforcer(Authority(lr_scale=(0.1, 10.0), slew_up=2.0, suspend_after=3))
    enforcer.rule(Action(lr_scale=0.1))
    scales = []
    for _ in range(3):
        assert not enforcer.suspended
        scales.append(enforcer.rule(Action(lr_scale=math.nan)).action.lr_scale)
    assert enforcer.suspended
    for _ in range(3):
        ruling = enforcer.rule(Action(lr_scale=5.0))
        assert ruling.action.regime == "suspended"
        scales.append(ruling.action.lr_scale)
    assert scales == [0.2, 0.4, 0.8, 1.0, 1.0, 1.0]
    assert enforcer.faults == 3


def test_skips_are_denied_past_their_budget_and_allowed_again_after_the_window():
    enforcer = Enforcer(Authority(max_skips=2, skip_window=5))
    skip = Action(directive=Directive.SKIP)
    executed = [enforcer.rule(skip).action.directive is Directive.SKIP for _ in range(8)]
    assert executed == [True, True, False, False, False, True, True, False]
    assert "skip denied: 2 in the last 5 decisions, 2 allowed" in enforcer.rule(skip).reasons


def test_a_skipped_step_is_no_rung_to_climb_past_the_slew_limit():
    enforcer = Enforcer(Authority(lr_scale=(0.01, 100.0), slew_up=2.0))
    for _ in range(5):
        assert enforcer.rule(Action(lr_scale=100.0, directive=Directive.SKIP)).action.lr_scale == 1.0
    assert enforcer.rule(Action(lr_scale=100.0)).action.lr_scale == 2.0


def test_rollbacks_are_denied_by_number_by_cooldown_and_without_a_good_state():
    enforcer = Enforcer(Authority(max_rollbacks=2, rollback_cooldown=3))
    rollback = Action(directive=Directive.ROLLBACK)
    assert "no good state" in enforcer.rule(rollback, restorable=False).reasons[0]
    assert enforcer.rollbacks == 0
    assert enforcer.rule(rollback).action.directive is Directive.ROLLBACK
    assert "cooling down" in enforcer.rule(rollback).reasons[0]
    enforcer.rule(NEUTRAL)
    assert enforcer.rule(rollback).action.directive is Directive.ROLLBACK
    denied = enforcer.rule(rollback)
    assert denied.action.directive is Directive.PROCEED
    assert "2 done, 2 allowed" in denied.reasons[0]


@given(AUTHORITIES, st.lists(PROPOSALS, max_size=20), st.lists(PROPOSALS, max_size=20))
def test_state_round_trip_rules_alike_from_there_on(authority, before, after):
    original, restored = Enforcer(authority), Enforcer(authority)
    for proposed in before:
        original.rule(proposed)
    restored.load_state_dict(json.loads(json.dumps(original.state_dict(), allow_nan=False)))
    for proposed in after:
        assert repr(restored.rule(proposed)) == repr(original.rule(proposed))
    assert restored.state_dict() == original.state_dict()
