"""`lbw_rl/LLMTraining-v0`: the Gymnasium contract, and that neutral actions are the base run."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import lbw_rl.envs  # noqa: F401 (registers the ids)
from lbw_rl.envs.llm_training import LLMTrainingEnv
from lbw_rl.envs.recipe import Recipe, load_recipe, override
from lbw_rl.features import FEATURES
from lbw_rl.signals import SIGNALS

NEUTRAL = np.zeros(2, dtype=np.float32)


def recipe(*changes: str) -> Recipe:
    tiny = ("train.steps=11", "model.hidden_size=16", "model.intermediate_size=16", "model.num_layers=1")
    small = ("data.sequence_length=16", "data.eval_sequences=4", "train.batch_size=2", "schedule.warmup_steps=2")
    return override(load_recipe("mini-qwen2"), [*tiny, *small, *changes])


def make(**arguments: Any) -> LLMTrainingEnv:
    return LLMTrainingEnv(**{"recipe": recipe(), "evaluate_every": 2, **arguments})


def test_passes_gymnasiums_checker() -> None:
    check_env(gymnasium.make("lbw_rl/LLMTraining-v0", recipe=recipe(), evaluate_every=2).unwrapped)
    check_env(make())


def test_same_seed_and_actions_same_bits_without_a_clock() -> None:
    def rollout() -> list[Any]:
        env = make(device_signals=False)
        observation, info = env.reset(seed=5)
        seen: list[Any] = [observation.tobytes()]
        for k in range(4):
            observation, reward, *_, info = env.step(np.array([0.2 * k, -0.1], dtype=np.float32))
            seen += [observation.tobytes(), reward, repr(info)]
        env.close()
        return seen

    assert rollout() == rollout()


def test_neutral_actions_are_the_base_run_bit_for_bit() -> None:
    env = make()
    _, info = env.reset(seed=3)
    assert info["gain"] == 0.0
    for k in range(6):
        observation, reward, terminated, truncated, info = env.step(NEUTRAL)
        assert observation in env.observation_space
        assert (reward, terminated, truncated) == (0.0, False, k == 5)
    env.close()


def test_rewards_add_up_to_the_final_gain_and_come_with_evaluations() -> None:
    env = make()
    env.reset(seed=3)
    action = np.array([0.5, -0.5], dtype=np.float32)
    rewards, truncated = [], False
    while not truncated:
        _, reward, _, truncated, info = env.step(action)
        rewards.append(reward)
    assert rewards[0] == rewards[2] == 0.0  # decisions without an evaluation
    assert sum(rewards) == pytest.approx(info["gain"], abs=1e-12)
    assert info["gain"] != 0.0
    assert info["lr_scale"] == pytest.approx(10.0)
    env.close()


def test_telemetry_is_the_table_and_shows_the_executed_action() -> None:
    env = make()
    observation, info = env.reset(seed=0)
    assert set(info["telemetry"]) == set(SIGNALS)
    assert info["telemetry"]["lr_scale"] == 1.0
    assert info["telemetry"]["progress"] == 0.0
    observation, *_, info = env.step(np.array([-0.5, 1.0], dtype=np.float32))
    names = list(FEATURES)
    assert info["telemetry"]["lr_scale"] == pytest.approx(0.1)
    assert info["telemetry"]["step"] == 2.0
    assert observation[names.index("lr_scale")] == pytest.approx(-1.0)
    assert observation[names.index("momentum_scale")] == pytest.approx(1.0)
    assert info["telemetry"]["update_ratio"] > 0
    assert info["telemetry"]["loss"] > 0
    env.close()


def test_same_seed_same_rewards_other_seed_others() -> None:
    def final(seed: int) -> float:
        env = make(base_run=False)
        env.reset(seed=seed)
        info: dict[str, Any] = {}
        for _ in range(6):
            *_, info = env.step(np.array([0.4, 0.0], dtype=np.float32))
        env.close()
        return float(info["gain"])

    assert final(1) == final(1) != final(2)


def test_a_run_that_blows_up_terminates_at_its_initial_loss() -> None:
    env = make(recipe=recipe("train.lr_multiplier=1e38", "optimizer.name=sgd"))
    env.reset(seed=0)
    rewards, terminated = [], False
    while not terminated:
        _, reward, terminated, truncated, info = env.step(np.array([1.0, 0.0], dtype=np.float32))
        rewards.append(reward)
        assert not truncated
    assert sum(rewards) == pytest.approx(info["gain"])
    assert info["gain"] <= 0.0
    env.close()


def test_refuses_wrong_use() -> None:
    with pytest.raises(ValueError, match="decide_every=0"):
        make(decide_every=0)
    env = make()
    with pytest.raises(RuntimeError, match="before reset"):
        env.step(NEUTRAL)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="NaN"):
        env.step(np.array([np.nan, 0.0], dtype=np.float32))
    with pytest.raises(ValueError, match="shape"):
        env.step(np.zeros(3, dtype=np.float32))
    env.close()
