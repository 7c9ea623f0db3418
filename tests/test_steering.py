"""A policy that multiplies a rule's scales: zero is the rule, the reach bounds it, and the base rate does not show."""

import json
import math

import numpy as np
import pytest
import torch
from governed_runs import WIDE, train_mlp
from hypothesis import given
from hypothesis import strategies as st

from lbw_rl import FEATURES, Action, Authority, Context, Governor, Telemetry, load_controller
from lbw_rl.action import Directive
from lbw_rl.json_state import from_json, to_json
from lbw_rl.policy import PolicyError, save_policy
from lbw_rl.steering import REACH, Stretches, relative, steered


@given(st.floats(1e-6, 1e6), st.floats(1e-3, 1e3), st.tuples(st.floats(-9, 9), st.floats(-9, 9)))
def test_no_position_leaves_the_reach_about_the_rule(lr, momentum, unit):
    action = steered(Action(lr_scale=lr, momentum_scale=momentum), unit)
    assert lr / REACH[0] * (1 - 1e-12) <= action.lr_scale <= lr * REACH[0] * (1 + 1e-12)
    assert momentum / REACH[1] * (1 - 1e-12) <= action.momentum_scale <= momentum * REACH[1] * (1 + 1e-12)


def test_the_ends_are_the_reach_and_the_middle_is_the_rule():
    rule = Action(lr_scale=0.3, momentum_scale=0.5, regime="steady", evidence={"target": 1.0})
    assert steered(rule, (0.0, 0.0)) == rule
    assert steered(rule, (1.0, -1.0)).lr_scale == pytest.approx(0.3 * REACH[0])
    assert steered(rule, (1.0, -1.0)).momentum_scale == pytest.approx(0.5 / REACH[1])


@pytest.mark.parametrize("directive", [Directive.SKIP, Directive.ROLLBACK])
def test_what_the_rule_refuses_is_refused(directive):
    rule = Action(lr_scale=0.3, directive=directive, regime="bad-batch")
    assert steered(rule, (1.0, 1.0)) is rule


def test_the_last_scale_is_seen_in_units_of_the_proposal():
    seen = relative({"lr_scale": np.array([6.0, 3.0]), "loss": np.array([1.0, 2.0])}, np.array([3.0, math.nan]))
    assert seen["lr_scale"][0] == 2.0
    assert math.isnan(seen["lr_scale"][1])
    assert seen["loss"].tolist() == [1.0, 2.0]


def frozen(folder, bias, weights=0.0, rule="lbw-guard", every=1, stretches=None):
    """A policy whose outputs are `bias` plus `weights` times a random mixture of its features."""
    mixture = np.random.default_rng(0).normal(size=(2, len(FEATURES))).astype(np.float32) / math.sqrt(len(FEATURES))
    return save_policy(
        folder,
        [(np.float32(weights) * mixture, np.array(bias, np.float32))],
        mean=np.zeros(len(FEATURES)),
        std=np.full(len(FEATURES), 10.0),  # nothing is unfamiliar
        authority=Authority(),
        decide_every=every,
        provenance={"rule": rule},
        card="# Card",
        rule=rule,
        stretches=stretches,
    )


def governed(controller, lr=1e-3, steps=40):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    with Governor(optimizer, controller, authority=WIDE, total_steps=steps, measure_device=False) as governor:
        train_mlp(model, optimizer, governor, steps)
    return [p.detach().clone() for p in model.parameters()]


def test_a_rule_that_proposed_to_stand_still_is_no_unit():
    assert math.isnan(relative({"lr_scale": 0.5}, 0.0)["lr_scale"])
    assert relative({"lr_scale": 0.5}, 0.25)["lr_scale"] == 2.0


def short_run(controller, planned, steps, mode="govern", authority=WIDE):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    options = {"authority": authority, "total_steps": planned, "mode": mode, "measure_device": False}
    with Governor(optimizer, controller, **options) as governor:
        train_mlp(model, optimizer, governor, steps)
    return governor


def test_past_the_planned_end_a_policy_stays_with_its_rule(tmp_path):
    policy, rule = (short_run(c, 10, 30) for c in (str(frozen(tmp_path / "zeros", (0.0, 0.0))), "lbw-guard"))
    assert policy.summary()["faults"] == {}
    assert policy.executed.lr_scale == rule.executed.lr_scale


@pytest.mark.parametrize(("mode", "authority"), [("shadow", WIDE), ("govern", Authority())])
def test_a_scale_that_was_not_executed_is_no_unfamiliar_run(mode, authority, tmp_path):
    """In shadow mode, or under bounds too narrow for what its rule asks, a wrong rate must not hand the run to the rule for good."""
    folder = frozen(tmp_path / "policy", (0.1, 0.0))
    header = json.loads((folder / "policy.json").read_text())
    scale = list(FEATURES).index("lr_scale")
    header["std"][scale] = 0.1  # as in training: a policy sees its own multiples
    (folder / "policy.json").write_text(json.dumps(header))
    governor = short_run(str(folder), 100, 60, mode, authority)
    assert governor.last_telemetry.lr_scale < 1.5  # where the rule asks for hundreds
    assert governor.summary()["controller"] == {"unfamiliar_decisions": 0, "fallback_active": False}


def test_a_policy_of_zeros_is_the_rule_in_every_bit(tmp_path):
    zeros = governed(str(frozen(tmp_path / "zeros", (0.0, 0.0))))
    for ours, rule in zip(zeros, governed("lbw-guard"), strict=True):
        assert torch.equal(ours, rule)


def test_the_base_rate_does_not_show_in_what_it_decides(tmp_path):
    """Through a policy that does depend on its features: from rates thirty times apart the runs end at the same weights."""
    folder = str(frozen(tmp_path / "mixed", (0.3, 0.0), weights=5.0))
    one, other, alone = governed(folder, lr=3e-3), governed(folder, lr=9e-2), governed("lbw-guard", lr=3e-3)
    for a, b, rule in zip(one, other, alone, strict=True):
        assert torch.allclose(a, b, atol=2e-3)
        assert not torch.allclose(a, rule, atol=2e-3)


def test_adapters_are_left_to_the_rule(tmp_path):
    """No proxy in training has any, and a policy that steers them regardless ends 10 % worse (docs/LOG.md, 2026-11-28)."""
    policy, rule = load_controller(frozen(tmp_path / "up", (1.0, 0.0))), load_controller("lbw-guard")
    for low_rank in (True, False):
        for controller in (policy, rule):
            controller.reset(Context(total_steps=100, weights=1000, low_rank=low_rank))
        telemetry = Telemetry(loss=4.0, grad_norm=1.0, learning_rate=1e-3, step=0.0, progress=0.0)
        same = policy.act(telemetry).lr_scale == rule.act(telemetry).lr_scale
        assert same is low_rank
        assert policy.summary()["fallback_active"] is low_rank


@pytest.mark.parametrize("stretches", [None, 12])
def test_a_restored_policy_goes_on_as_if_nothing_had_happened(tmp_path, stretches):
    folder = str(frozen(tmp_path / "mixed", (0.3, 0.0), weights=5.0, every=4, stretches=stretches))  # within a hold
    one, other = load_controller(folder), load_controller(folder)
    for controller in (one, other):
        controller.reset(Context(total_steps=100, weights=1000, momentum=0.9))
    rng = np.random.default_rng(0)

    def telemetry(step):
        signals = {"loss": 3 - step / 100, "grad_norm": rng.uniform(0.5, 2), "update_ratio": 0.01, "weight_rms": 0.02}
        return Telemetry(
            step=step, progress=step / 100, learning_rate=1e-3, lr_scale=0.7, momentum_scale=1.0, **signals
        )

    for step in range(15):
        one.act(telemetry(step))
    other.load_state_dict(from_json(to_json(one.state_dict())))
    for step in range(15, 20):
        t = telemetry(step)
        assert one.act(t) == other.act(t)


def test_the_rule_acts_at_every_step_and_the_multiples_hold_for_theirs(tmp_path):
    policy = load_controller(frozen(tmp_path / "mixed", (0.3, 0.0), weights=5.0, every=4))
    assert policy.decide_every == 1
    rule = load_controller("lbw-guard")
    for controller in (policy, rule):
        controller.reset(Context(total_steps=40, weights=1000, momentum=0.9))
    multiples, proposals, last = [], [], 1.0
    for step in range(12):
        signals = {"loss": 3 - step / 100, "grad_norm": 1.0, "update_ratio": 0.01 * (1 + step % 3), "weight_rms": 0.02}
        t = Telemetry(step=step, progress=step / 40, learning_rate=1e-3, lr_scale=last, momentum_scale=1.0, **signals)
        proposals.append(rule.act(t).lr_scale)
        last = policy.act(t).lr_scale
        multiples.append(last / proposals[-1])
    assert len(set(proposals)) > 9
    held = np.array(multiples).reshape(3, 4)
    assert held == pytest.approx(held[:, :1].repeat(4, axis=1))
    assert len(set(held[:, 0].round(6))) > 1


def seen_at(*progress: float):
    features = np.zeros((len(progress), len(FEATURES)), dtype=np.float32)
    features[:, list(FEATURES).index("progress")] = 2 * np.array(progress) - 1
    return features


def test_an_action_is_due_where_a_part_of_the_run_begins():
    stretches = Stretches(2, 3)
    due = [stretches(seen_at(k / 9, min(1.0, k / 3))).tolist() for k in range(10)]
    one, other = ([k for k in range(10) if row[k]] for row in zip(*due, strict=True))
    assert one == [1, 3, 6]
    assert other == [1, 2]  # the first part was over before anything was measured
    again = Stretches(2, 3)
    again.load_state_dict(from_json(to_json(stretches.state_dict())))
    assert not again(seen_at(0.0, 1.0)).any()
    always = Stretches(2, None)
    assert always(seen_at(0.5, 0.5)).all()


def test_a_policy_of_stretches_holds_its_multiples_through_each(tmp_path):
    policy = load_controller(frozen(tmp_path / "mixed", (0.1, 0.0), weights=1.0, every=2, stretches=3))
    for horizon in (30, None):
        rule = load_controller("lbw-guard")
        for controller in (policy, rule):
            controller.reset(Context(total_steps=horizon, weights=1000, momentum=0.9))
        multiples, last = [], 1.0
        for step in range(30):
            t = Telemetry(
                step=step, progress=step / horizon if horizon else math.nan, learning_rate=1e-3, lr_scale=last, momentum_scale=1.0,
                loss=3 - step / 100, grad_norm=1 + step % 5, update_ratio=0.01, weight_rms=0.02,
            )  # fmt: skip
            proposed, last = rule.act(t).lr_scale, policy.act(t).lr_scale
            multiples.append(round(last / proposed, 9))
        changes = [k for k in range(1, 30) if multiples[k] != multiples[k - 1]]
        assert multiples[0] == 1.0
        assert changes == ([2, 10, 20] if horizon else [2])


def test_a_rule_keeps_the_pace_that_the_policy_was_trained_with(tmp_path):
    """Policies of before `rule_every` decided when their rule did; one of them fares worse with another pace beneath it."""
    folder = frozen(tmp_path / "policy", (0.3, 0.0), every=2)
    header = json.loads((folder / "policy.json").read_text())
    assert header.pop("rule_every") == 1
    (folder / "policy.json").write_text(json.dumps(header))
    assert load_controller(folder).decide_every == 2
    (folder / "policy.json").write_text(json.dumps(header | {"rule_every": 3}))
    with pytest.raises(ValueError, match=r"ppo\.every: 2 is no multiple of the 3 steps that its rule acts at"):
        load_controller(folder)


@pytest.mark.parametrize("reach", [(0.5, 1.25), (math.inf, 1.25), (2.0, math.nan)])
def test_a_reach_below_one_or_without_end_is_refused(tmp_path, reach):
    folder = frozen(tmp_path / "policy", (0.0, 0.0))
    header = json.loads((folder / "policy.json").read_text())
    (folder / "policy.json").write_text(json.dumps(header | {"reach": reach}))
    with pytest.raises(PolicyError, match=r"reach is .*finite numbers ≥ 1"):
        load_controller(str(folder))


def test_a_policy_steers_the_rule_that_it_falls_back_to_or_none(tmp_path):
    folder = frozen(tmp_path / "policy", (0.0, 0.0))
    header = json.loads((folder / "policy.json").read_text())
    (folder / "policy.json").write_text(json.dumps(header | {"relative_to": "pid"}))
    with pytest.raises(PolicyError, match="relative_to is 'pid'; accepted: 'schedule', or the fallback's 'lbw-guard'"):
        load_controller(str(folder))
