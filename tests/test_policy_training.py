"""PPO on proxies: the adapter, exact resume, the actor's arrays, and that it learns."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env.base_vec_env import VecEnv

from lbw_rl.authority import Authority
from lbw_rl.envs.families.ngram import NGramShape
from lbw_rl.envs.fleet import FleetShape
from lbw_rl.envs.mixture import MIXTURES, ProxyKind, mixture_named
from lbw_rl.envs.proxy_runs import BatchShape
from lbw_rl.features import FEATURES
from lbw_rl.training_runs.actor import Actor, actor_of
from lbw_rl.training_runs.fleet_vec_env import FleetVecEnv
from lbw_rl.training_runs.policy_evaluation import Judge, uniform
from lbw_rl.training_runs.policy_training import CHECKPOINT_FILE, CURVE_FILE, PPOSettings, TrainingResult, train
from lbw_rl.training_runs.ppo_session import PPOSession

TINY = ProxyKind(
    shape=FleetShape(vocab=16, width=8, heads=1, ffn=8),
    batch=BatchShape(sequences=2, length=4, held_out=2),
    horizon=(6, 14),
)
NGRAM = replace(TINY, shape=NGramShape(vocab=16, context=2, width=4, hidden=8))
PROGRESS = list(FEATURES).index("progress")
SHORT = PPOSettings(n_steps=4, batch_size=16, n_epochs=2, rollouts_per_segment=2)


class Countdown(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Run i ends after i + 2 steps, odd ones by termination; the reward is action[0] times the step number."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, num_envs: int, first: int = 0) -> None:
        self.num_envs = num_envs
        self.single_observation_space = gymnasium.spaces.Box(-100, 100, (1,), np.float32)
        self.single_action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.length, self.seeds = np.arange(first, first + num_envs) + 2, []
        self.t = np.zeros(num_envs)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self.seeds = seed
        self.t[:] = 0
        return self.t[:, None].astype(np.float32), {}

    def step(self, actions: np.ndarray) -> Any:
        self.t += 1
        rewards, done = actions[:, 0] * self.t, self.t >= self.length
        final = [np.array([t], dtype=np.float32) if d else None for t, d in zip(self.t, done, strict=True)]
        self.t[done] = 0
        odd = self.length % 2 == 1
        return self.t[:, None].astype(np.float32), rewards, done & odd, done & ~odd, {"final_obs": final}


def test_adapter_presents_every_episode_whole() -> None:
    env = FleetVecEnv([Countdown(2), Countdown(1, first=2)], bootstrap_truncated=True)
    assert env.num_envs == 3
    env.seed(5)
    assert env.reset().tolist() == [[0.0], [0.0], [0.0]]
    assert [e.seeds for e in env.environments] == [[5, 6], [7]]  # type: ignore[attr-defined]
    episodes: list[list[dict[str, Any]]] = [[], [], []]
    for _ in range(12):
        observations, rewards, dones, infos = env.step(np.ones((3, 1), dtype=np.float32))
        assert rewards.dtype == np.float32
        for i in range(3):
            assert bool(infos[i]) is bool(dones[i])
            if dones[i]:
                assert observations[i] == 0.0
                episodes[i].append(infos[i])
    for i, found in enumerate(episodes):
        length = i + 2
        assert len(found) == 12 // length
        for info in found:
            assert info["terminal_observation"] == [length]
            assert info["TimeLimit.truncated"] is (length % 2 == 0)
            assert (info["episode"]["r"], info["episode"]["l"]) == (length * (length + 1) / 2, length)
    env.close()


def test_adapter_reports_no_truncation_where_the_horizon_is_the_task() -> None:
    env = FleetVecEnv([Countdown(1)])
    env.reset()
    env.step(np.ones((1, 1), dtype=np.float32))
    *_, infos = env.step(np.ones((1, 1), dtype=np.float32))
    assert infos[0]["TimeLimit.truncated"] is False
    assert isinstance(env, VecEnv)
    with pytest.raises(ValueError, match="at least one"):
        FleetVecEnv([])
    late = Countdown(1)
    late.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    with pytest.raises(ValueError, match="SAME_STEP"):
        FleetVecEnv([late])


def test_actor_is_the_networks_mean_action() -> None:
    model = PPO("MlpPolicy", FleetVecEnv([Countdown(1)]), policy_kwargs={"net_arch": [5, 4]}, device="cpu", seed=0)
    with torch.no_grad():
        model.policy.action_net.weight.mul_(100.0)  # away from zero
    actor = actor_of(model.policy)
    assert [w.shape for w, _ in actor.layers] == [(5, 1), (4, 5), (1, 4)]
    x = np.linspace(-3, 3, 7, dtype=np.float32)[:, None]
    expected = np.clip(model.predict(x, deterministic=True)[0], -1, 1)
    assert actor(x) == pytest.approx(expected, abs=1e-6)


def test_normalising_moves_the_statistics_into_the_first_layer() -> None:
    rng = np.random.default_rng(0)
    sizes = [18, 6, 2]
    layers = [(rng.normal(size=(o, i)).astype(np.float32), rng.normal(size=o).astype(np.float32)) for i, o in
              pairwise(sizes)]  # fmt: skip
    actor, mean, std = Actor(layers), rng.normal(size=18), rng.uniform(0.1, 2, 18)
    x = rng.normal(size=(9, 18)).astype(np.float32)
    assert actor.normalised(mean, std)((x - mean) / std) == pytest.approx(actor(x), abs=1e-5)


def short(out: Path, decisions: int = 128, **arguments: Any) -> TrainingResult:
    return train(decisions, 3, out, settings=SHORT, mixture=((TINY, 3), (NGRAM, 5)), **arguments)


def test_training_reports_and_returns_what_freezing_needs(tmp_path: Path) -> None:
    records: list[dict[str, float]] = []
    result = short(tmp_path, progress=records.append)
    assert [r["decisions"] for r in records] == [32, 64, 96, 128]
    assert {"return_mean", "clip_fraction", "entropy", "eta_seconds"} <= set(records[0])
    assert records[-1]["eta_seconds"] == 0.0
    curve = [json.loads(line) for line in (tmp_path / CURVE_FILE).read_text().splitlines()]
    assert [line["decisions"] for line in curve] == [32, 64, 96, 128]
    assert [w.shape for w, _ in result.actor.layers] == [(32, len(FEATURES)), (32, 32), (2, 32)]
    assert result.log_std.shape == (2,)
    assert result.features == list(FEATURES)
    assert result.decisions == 128
    assert (result.std >= 0.1).all()
    assert result.mean.shape == (len(FEATURES),)
    json.dumps(result.provenance)
    assert result.provenance["seed"] == 3
    assert {"torch", "gymnasium", "stable_baselines3"} <= set(result.provenance["versions"])
    changed = [
        not np.array_equal(a[0], b[0]) for a, b in zip(result.actor.layers, result.untrained.layers, strict=True)
    ]
    assert all(changed)


def same(a: TrainingResult, b: TrainingResult) -> bool:
    pairs = zip([*sum(a.actor.layers, ()), a.mean, a.std], [*sum(b.actor.layers, ()), b.mean, b.std], strict=True)
    return all(np.array_equal(x, y) for x, y in pairs) and a.return_mean == b.return_mean


def test_resumed_training_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(record: dict[str, float]) -> None:
        if record["decisions"] == 96:
            raise Killed

    whole = short(tmp_path / "whole")
    with pytest.raises(Killed):
        short(tmp_path / "part", progress=kill)
    assert (tmp_path / "part" / CHECKPOINT_FILE).exists()
    resumed = short(tmp_path / "part", resume=True)
    assert same(whole, resumed)
    curves = [(tmp_path / name / CURVE_FILE).read_text() for name in ("whole", "part")]
    assert curves[0] == curves[1]
    assert same(whole, short(tmp_path / "part", resume=True))  # nothing left to do
    with pytest.raises(ValueError, match="seed"):
        train(128, 4, tmp_path / "part", settings=SHORT, mixture=((TINY, 3), (NGRAM, 5)), resume=True)


def test_a_rollout_is_split_into_equal_batches(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """A last batch of a few transitions would weigh as much as a whole one; stable-baselines3 warns of it."""
    env = FleetVecEnv([TINY.fleet(3)])
    settings = PPOSettings(n_steps=4, batch_size=10)  # a rollout of 12
    assert PPOSession(env, 12, 0, tmp_path, settings, {}, None).model.batch_size == 6
    assert not [w for w in recwarn if "mini-batch" in str(w.message)]
    env.close()


@pytest.mark.slow
def test_fleets_on_a_ray_cluster_train_the_same_policy_bit_for_bit(tmp_path: Path) -> None:
    """Two fleets in two processes."""
    ray = pytest.importorskip("ray", reason="needs the extra lbw-rl[ray]")
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        assert same(short(tmp_path / "local"), short(tmp_path / "ray", backend="ray"))
    finally:
        ray.shutdown()


def test_every_mixture_says_what_it_is_made_of() -> None:
    for name, mixture in MIXTURES.items():
        assert mixture_named(name) is mixture
        for kind, n in mixture:
            env = kind.fleet(1)
            record = json.loads(json.dumps(kind.record()))
            assert n > 0
            assert record["model"] == kind.shape.name
            assert record["split"] == "train"
            assert set(record["corpora"]) == set(env.task_distribution["corpora"])
            assert tuple(record["horizon"]) == env.task_distribution["horizon"]


def test_checkpoint_holds_no_code(tmp_path: Path) -> None:
    short(tmp_path)
    state = torch.load(tmp_path / CHECKPOINT_FILE, weights_only=True)
    assert {"policy", "optimizer", "decisions", "segment"} <= set(state)


def test_training_keeps_the_number_of_threads(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    short(tmp_path, decisions=1)
    assert torch.get_num_threads() == 2


def test_refuses_bad_budgets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="decisions=0"):
        train(0, 0, tmp_path)
    with pytest.raises(ValueError, match="mixture: 'narrow' is unknown; accepted: plain, broad, tokens"):
        train(1, 0, tmp_path, mixture="narrow")


def test_evaluation_pairs_policies_on_the_same_proxies() -> None:
    judge, ended = Judge(6, kinds=(TINY, NGRAM)), []
    idle = judge(lambda x: np.zeros((len(x), 2), dtype=np.float32), ended.append)
    random = judge(uniform(0))
    assert ended == [3, 6]
    assert (idle.gains == 0.0).all()
    assert np.array_equal(idle.lr_errors, random.lr_errors)
    assert not (random.gains == 0.0).all()
    assert set(random.summary()) >= {"gain", "standard_error", "diverged"}


@pytest.mark.parametrize("rule", [None, "lbw-guard"])
def test_a_judge_measures_against_the_base_runs_that_an_environment_would_have(rule: str | None) -> None:
    env = TINY.fleet(4, rule=rule)
    act, observations, gains = uniform(1), env.reset(seed=5)[0], np.full(4, np.nan)
    while np.isnan(gains).any():
        observations, _, terminated, truncated, info = env.step(act(observations))
        first = (terminated | truncated) & np.isnan(gains)
        if first.any():
            gains[first] = info["final_info"]["gain"][first]
    judged = Judge(4, kinds=(TINY,), seed=5, rule=rule)(uniform(1))
    assert judged.gains == pytest.approx(gains, abs=1e-6)


def test_a_judge_holds_what_a_policy_answers_when_a_stretch_begins() -> None:
    def turning(x: np.ndarray) -> np.ndarray:
        return np.where(x[:, [PROGRESS]] < 0.0, -0.9, 0.9).astype(np.float32).repeat(2, axis=1)

    def steady(x: np.ndarray) -> np.ndarray:
        return np.where(x[:, [PROGRESS]] == -1.0, 0.0, -0.9).astype(np.float32).repeat(2, axis=1)

    judge = Judge(3, kinds=(TINY,))
    assert np.array_equal(judge(turning, stretches=1).gains, judge(steady).gains)
    assert not np.array_equal(judge(turning, stretches=2).gains, judge(steady).gains)


def test_learns_to_repair_a_learning_rate_that_is_too_low(tmp_path: Path) -> None:
    """The trivial thing: every run is thirtyfold too slow, so the scale must go up."""
    slow = ProxyKind(lr_error=(0.03, 0.03), well_tuned=0.0, horizon=(16, 16))
    settings = PPOSettings(n_steps=8, batch_size=128, rollouts_per_segment=8, log_std_init=-0.5)
    authority = Authority(lr_scale=(1e-2, 1e2), momentum_scale=(0.5, 2.0), slew_up=100.0)
    result = train(14 * 256, 0, tmp_path, settings=settings, mixture=((slow, 16), (slow, 16)), authority=authority)

    def act(observations: np.ndarray) -> np.ndarray:
        return result.actor((observations - result.mean) / result.std)

    judge = Judge(12, authority=authority, kinds=(slow,))
    gain = judge(act).gains.mean()
    assert gain > 0.2
    assert gain > judge(uniform(0)).gains.mean()


@pytest.mark.slow
def test_learns_to_govern_the_whole_task_distribution(tmp_path: Path) -> None:
    result = train(60_000, 0, tmp_path)

    def act(observations: np.ndarray) -> np.ndarray:
        return result.actor((observations - result.mean) / result.std)

    judge = Judge(64)
    learned = judge(act).summary()
    assert learned["gain"] > 0.15
    assert learned["gain"] > judge(uniform(0)).summary()["gain"] + 0.5
    assert learned["diverged"] < 0.05
