"""`lbw_rl/ProxyTraining-v0` with a rule: actions are multiples of what it proposes, at its own pace."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lbw_rl.action import Action, Directive
from lbw_rl.controllers.constant import Constant
from lbw_rl.envs.fleet import FleetShape
from lbw_rl.envs.proxy_runs import BatchShape
from lbw_rl.envs.proxy_training import ProxyTrainingVectorEnv
from lbw_rl.envs.tasks import sample_tasks
from lbw_rl.features import FEATURES
from lbw_rl.steering import REACH

FEATURE_NAMES = list(FEATURES)


def make(num_envs: int, **arguments: Any) -> ProxyTrainingVectorEnv:
    tiny = {"shape": FleetShape(vocab=16, width=8, heads=1, ffn=8), "batch": BatchShape(2, 4, 2), "horizon": (6, 14)}
    return ProxyTrainingVectorEnv(num_envs, **{**tiny, **arguments})


@pytest.mark.parametrize("rule", ["lbw-guard", "pid"])
def test_zero_leaves_a_run_to_the_rule(rule: str) -> None:
    env = make(6, rule=rule)
    env.reset(seed=3)
    scales = set()
    for _ in range(12):
        _, rewards, _, _, info = env.step(np.zeros((6, 2), dtype=np.float32))
        assert not rewards.any()
        scales.update(info["lr_scale"])
    assert len(scales) > 12  # the rule does act


def test_an_action_multiplies_what_the_rule_proposes_and_its_loop_takes_the_multiple_for_its_own() -> None:
    """√2 times the scale gives √2 times the update at once, and the rule goes on proposing what it would have."""
    tasks = sample_tasks(np.random.default_rng(1), 2, horizon=(14, 14), lr_error=(1.0, 1.0))
    for field in ("seed", "lr", "schedule", "warmup", "beta1", "beta2", "weight_decay", "clip", "corpus"):
        getattr(tasks, field)[1] = getattr(tasks, field)[0]
    env = make(2, horizon=(14, 14), rule="lbw-guard", decide_every=1)
    env.reset(seed=0, options={"tasks": tasks})
    for _ in range(3):
        env.step(np.zeros((2, 2), dtype=np.float32))
    observed, _, _, _, info = env.step(np.array([[0, 0], [1, 0]], dtype=np.float32))
    assert info["lr_scale"][1] == pytest.approx(REACH[0] * info["lr_scale"][0])
    ratio = info["telemetry"]["update_ratio"]
    assert ratio[1] == pytest.approx(REACH[0] * ratio[0], rel=1e-3)
    assert observed[:, FEATURE_NAMES.index("lr_scale")] == pytest.approx([0.0, math.log10(REACH[0])])
    proposals = [p.lr_scale for p in env._governed._proposals]
    assert proposals[1] == pytest.approx(proposals[0], rel=0.05)


def test_a_rule_acts_at_every_step_however_seldom_actions_come() -> None:
    """The same action four times in a row, or once for four steps: the same run, in every bit."""
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 4, 2)).astype(np.float32)
    tasks = sample_tasks(np.random.default_rng(1), 4, horizon=(12, 12))
    finals = []
    for every in (1, 4):
        env = make(4, horizon=(12, 12), rule="lbw-guard", decide_every=every)
        env.reset(seed=0, options={"tasks": tasks})
        for action in actions.repeat(4 // every, axis=0):
            *_, info = env.step(action)
        finals.append(info["final_info"])
    assert np.array_equal(finals[0]["lr_scale"], finals[1]["lr_scale"])
    assert np.array_equal(finals[0]["gain"], finals[1]["gain"])
    assert (finals[0]["gain"] != 0.0).all()


def test_a_rule_at_a_pace_that_does_not_fit_is_refused() -> None:
    class EveryThird(Constant):
        decide_every = 3

    with pytest.raises(ValueError, match="decide_every: 4 is no multiple of the 3 steps"):
        make(2, horizon=(14, 14), rule=EveryThird(), decide_every=4)


def test_an_update_that_the_rule_skips_leaves_no_trace() -> None:
    env = make(3, horizon=(14, 14), rule="lbw-guard", decide_every=1)
    env.reset(seed=0)
    runs = env._governed.runs
    env._governed._proposals[1] = Action(directive=Directive.SKIP)
    before = [buffer[1].clone() for buffer in runs.fleet._buffers()]
    env.step(np.ones((3, 2), dtype=np.float32))
    weights, _, mean, square = runs.fleet._buffers()
    for now, then in zip((weights, mean, square), (before[0], before[2], before[3]), strict=True):
        assert torch.equal(now[1], then)
    assert runs.fleet.optimizer.steps.tolist() == [1, 0, 1]
    assert runs.step.tolist() == [1, 1, 1]
