"""`lbw_rl/ProxyTraining-v0`: rewards with exact answers, autoreset, seeding, authority, tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lbw_rl.envs  # noqa: F401 (registers the ids)
from lbw_rl.action import log_interpolate
from lbw_rl.authority import Authority
from lbw_rl.envs.fleet import FleetShape
from lbw_rl.envs.held_out_gain import DIVERGED_DECISIONS, DivergenceWatch, HeldOutGain
from lbw_rl.envs.interface import DEFAULT_AUTHORITY, command
from lbw_rl.envs.proxy_runs import BatchShape
from lbw_rl.envs.proxy_training import ProxyTrainingVectorEnv
from lbw_rl.envs.synthetic_device import SyntheticDevice
from lbw_rl.envs.tasks import sample_tasks
from lbw_rl.features import FEATURES
from lbw_rl.signals import SIGNALS

TINY: dict[str, Any] = {
    "shape": FleetShape(vocab=16, width=8, heads=1, ffn=8),
    "batch": BatchShape(sequences=2, length=4, held_out=2),
    "horizon": (6, 14),
}


FEATURE_NAMES = list(FEATURES)


def make(num_envs: int = 4, **arguments: Any) -> ProxyTrainingVectorEnv:
    return ProxyTrainingVectorEnv(num_envs, **{**TINY, **arguments})


def random_actions(num_envs: int, seed: int = 0) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    while True:
        yield rng.uniform(-1, 1, (num_envs, 2)).astype(np.float32)


# -- rewards -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [TINY, {}], ids=["tiny", "default"])
def test_neutral_actions_earn_exactly_zero(size: dict[str, Any]) -> None:
    """The governed twin is the base run bit for bit, divergence and restarts included."""
    env = ProxyTrainingVectorEnv(6, **({"horizon": (8, 20)} | size))
    env.reset(seed=0)
    finished = 0
    for _ in range(25 if size else 12):
        _, rewards, terminated, truncated, _ = env.step(np.zeros((6, 2), dtype=np.float32))
        assert (rewards == 0.0).all()
        finished += (terminated | truncated).sum()
    assert finished > 3


def test_returns_telescope_to_the_final_gain() -> None:
    env = make(8)
    env.reset(seed=1)
    returns, gains = np.zeros(8), []
    for _, actions in zip(range(30), random_actions(8), strict=False):
        _, rewards, terminated, truncated, info = env.step(actions)
        returns += rewards
        done = terminated | truncated
        if done.any():
            final = info["final_info"]["gain"][done]
            assert returns[done] == pytest.approx(final, abs=1e-12)
            gains += final.tolist()
            returns[done] = 0.0
            assert (info["gain"][done] == 0.0).all()
    assert len(gains) > 20
    assert np.ptp(gains) > 0


def test_final_gain_is_the_difference_of_independently_trained_runs() -> None:
    """Against the environment's own claim: train base and governed run again, outside of it."""
    from lbw_rl.envs.proxy_runs import ProxyData, ProxyRuns

    tasks = sample_tasks(np.random.default_rng(3), 3, horizon=(8, 8), well_tuned=1.0)
    env = make(3, horizon=(8, 8))
    env.reset(seed=0, options={"tasks": tasks})
    for _ in range(4):
        *_, truncated, info = env.step(np.tile(np.float32([0.3, -0.4]), (3, 1)))
    assert truncated.all()
    data = ProxyData(3, 8, TINY["shape"], TINY["batch"])
    data.put(range(3), tasks)
    final = []
    for lr, momentum in ((1.0, 1.0), (10**0.6, 2**-0.4)):
        runs = ProxyRuns(data)
        runs.start(range(3))
        initial = runs.held_out_losses()
        for _ in range(8):
            runs.update(np.full(3, lr), np.full(3, momentum))
            runs.backward()
        final.append(np.minimum(runs.held_out_losses(), initial))
    assert info["final_info"]["gain"] == pytest.approx(final[0] - final[1], abs=1e-4)


def test_without_base_run_the_return_is_the_runs_own_progress() -> None:
    env, other = make(3), make(3, base_run=False)
    for e in (env, other):
        e.reset(seed=4)
    neutral = np.zeros((3, 2), dtype=np.float32)
    assert (env.step(neutral)[1] == 0.0).all()
    *_, info = other.step(neutral)
    assert (info["gain"] != 0.0).any()


def test_gain_counts_losses_at_most_at_their_initial_value() -> None:
    gain = HeldOutGain(3)
    gain.reset([0, 1, 2], np.array([4.0, 4.0, 4.0]))
    no, yes = np.zeros(3, dtype=bool), np.array([False, False, True])
    assert gain.rewards(np.array([3.0, 9.0, np.nan]), no, np.array([3.5, 3.0, 2.0]), no).tolist() == [0.5, -1.0, -2.0]
    assert gain.rewards(np.array([2.0, 3.0, 1.0]), yes, np.array([3.0, 3.0, 2.0]), no).tolist() == [0.5, 1.0, 0.0]


def test_divergence_needs_patience_or_a_broken_loss() -> None:
    watch, initial = DivergenceWatch(3), np.full(3, 2.0)
    train = np.array([1.0, 1.0, 1.0])
    for k in range(DIVERGED_DECISIONS):
        held_out = np.array([9.0, 9.0 if k else 1.0, 2.9])
        assert watch(train, held_out, initial).tolist() == [k + 1 == DIVERGED_DECISIONS, False, False]
    assert watch(np.array([1.0, np.inf, 1.0]), np.ones(3), initial).tolist() == [True, True, False]
    watch.reset([0])
    assert watch(train, np.ones(3), initial).tolist() == [False, True, False]


@pytest.mark.parametrize("rule", [None, "lbw-guard"])
def test_an_early_end_settles_what_the_base_run_still_reaches(rule: str | None) -> None:
    env = make(2, horizon=(14, 14), rule=rule)
    env.reset(seed=0, options={"tasks": sample_tasks(np.random.default_rng(0), 2, horizon=(14, 14), well_tuned=1.0)})
    neutral = np.zeros((2, 2), dtype=np.float32)
    env.step(neutral)
    assert env._base is not None
    initial, base = env._gain.initial.copy(), env._base.left_alone([0, 1])
    env._governed.runs.fleet.weights.data[1] = np.nan
    _, _, terminated, truncated, info = env.step(neutral)
    assert terminated.tolist() == [False, True]
    assert not truncated.any()
    assert info["final_info"]["gain"][1] == pytest.approx(base[1] - initial[1], abs=1e-6)
    assert base[1] < initial[1]
    for _ in range(5):
        _, more, _, truncated, _ = env.step(neutral)
        assert more[0] == 0.0  # the other run never notices
    assert truncated[0]


# -- the Gymnasium contract --------------------------------------------------------------------------


def test_registered_with_spaces_and_autoreset_mode() -> None:
    env = gymnasium.make_vec("lbw_rl/ProxyTraining-v0", num_envs=3, vectorization_mode="vector_entry_point", **TINY)
    assert env.metadata["autoreset_mode"] is gymnasium.vector.AutoresetMode.SAME_STEP
    assert env.single_observation_space.shape == (len(FEATURES),)
    assert env.single_action_space == gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    observations, _ = env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(12):
        observations, rewards, terminated, truncated, _ = env.step(env.action_space.sample())
        assert observations in env.observation_space
        assert rewards.shape == terminated.shape == truncated.shape == (3,)
        assert not (terminated & truncated).any()
    env.close()


def test_docstring_lists_every_feature_in_order() -> None:
    lines = [line.split("|") for line in (ProxyTrainingVectorEnv.__doc__ or "").splitlines() if line.count("|") == 6]
    named = [cells[2].strip() for cells in lines if cells[1].strip().isdigit()]
    assert named[-len(FEATURES) :] == list(FEATURES)


def test_finished_runs_restart_within_the_step() -> None:
    env = make(4)
    env.reset(seed=2)
    for _, actions in zip(range(20), random_actions(4), strict=False):
        observations, _, terminated, truncated, info = env.step(actions)
        done = terminated | truncated
        if done.any() and not done.all():
            break
    assert (info["_final_obs"] == done).all()
    assert (info["_final_info"] == done).all()
    progress = list(FEATURES).index("progress")
    for i in range(4):
        if done[i]:
            assert info["final_obs"][i][progress] == 1.0
            assert observations[i][progress] == -1.0
            assert info["telemetry"]["step"][i] == 0.0
            assert info["final_info"]["telemetry"]["step"][i] == info["final_info"]["task"]["horizon"][i]
        else:
            assert info["final_obs"][i] is None
            assert info["telemetry"]["step"][i] > 0.0


def test_a_restart_leaves_the_other_runs_bitwise_alone() -> None:
    env, undisturbed = make(3, horizon=(14, 14)), make(3, horizon=(14, 14))
    for e in (env, undisturbed):
        e.reset(seed=5)
    for k, actions in zip(range(6), random_actions(3), strict=False):
        if k == 3:
            env.reset(options={"reset_mask": np.array([False, True, False])})
        a, b = env.step(actions), undisturbed.step(actions)
        for mine, theirs in zip(a[:2], b[:2], strict=True):
            assert np.array_equal(mine[[0, 2]], theirs[[0, 2]])
        assert np.array_equal(a[0][1], b[0][1]) is (k < 3)


def test_what_was_seen_of_the_other_runs_stays_after_a_restart_and_a_seed_is_not_theirs() -> None:
    env, undisturbed = make(2, horizon=(14, 14)), make(2, horizon=(14, 14))
    actions = np.zeros((2, 2), dtype=np.float32)
    mask = np.array([True, False])
    for e in (env, undisturbed):
        e.reset(seed=5)
        seen = e.step(actions)
    observation, info = env.reset(seed=9, options={"reset_mask": mask})
    assert np.array_equal(observation[1], seen[0][1])
    assert not np.array_equal(observation[0], seen[0][0])
    for name, value in info["telemetry"].items():
        assert np.array_equal(value[1], seen[4]["telemetry"][name][1], equal_nan=True), name
    for _ in range(10):  # past the end of their first task
        assert np.array_equal(env.step(actions)[0][1], undisturbed.step(actions)[0][1])


def test_same_seed_same_bits_and_one_seed_per_run() -> None:
    def rollout(seed: Any) -> list[np.ndarray]:
        env = make(3)
        seen = [env.reset(seed=seed)[0]]
        for _, actions in zip(range(12), random_actions(3), strict=False):
            seen += env.step(actions)[:2]
        return seen

    first = rollout(7)
    assert all(np.array_equal(a, b) for a, b in zip(first, rollout(7), strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(first, rollout([7, 8, 9]), strict=True))
    assert not np.array_equal(first[-2], rollout(8)[-2])


def test_reset_without_seed_goes_on_drawing() -> None:
    env = make(2)
    a = env.reset(seed=0)[0]
    b = env.reset()[0]
    assert not np.array_equal(a, b)
    assert np.array_equal(env.reset(seed=0)[0], a)
    assert np.array_equal(env.reset()[0], b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_envs": 0}, "num_envs=0"), ({"decide_every": 0}, "decide_every=0"), ({"horizon": (1, 9)}, "horizon")],
)
def test_refuses_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_refuses_bad_use() -> None:
    env = make(2)
    with pytest.raises(RuntimeError, match="before reset"):
        env.step(np.zeros((2, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="3 seeds"):
        env.reset(seed=[1, 2, 3])
    with pytest.raises(ValueError, match="reset_mask"):
        env.reset(seed=0, options={"reset_mask": np.zeros(2, dtype=bool)})
    with pytest.raises(ValueError, match="tasks"):
        env.reset(seed=0, options={"tasks": sample_tasks(np.random.default_rng(0), 1)})
    env.reset(seed=0)
    with pytest.raises(ValueError, match="shape"):
        env.step(np.zeros((3, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="NaN"):
        env.step(np.full((2, 2), np.nan, dtype=np.float32))


# -- actions -----------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(units=st.lists(st.tuples(st.floats(-3, 3, width=32), st.floats(-3, 3, width=32)), min_size=1, max_size=6))
def test_commands_are_the_bijection_held_to_the_authority(units: list[tuple[float, float]]) -> None:
    authority = Authority(lr_scale=(0.1, 4.0), momentum_scale=(0.5, 1.5), slew_up=1.7)
    executed = 1.0
    for unit in units:
        action, _ = authority.clip(command(np.array(unit), authority), executed)
        raw = log_interpolate(unit[0], authority.lr_scale)
        assert action.lr_scale == pytest.approx(min(raw, max(executed, 0.1) * 1.7), rel=1e-9)
        assert 0.5 <= action.momentum_scale <= 1.5
        executed = action.lr_scale


def test_environment_executes_what_the_authority_leaves() -> None:
    authority = Authority(lr_scale=(0.01, 100.0), momentum_scale=(0.5, 2.0), slew_up=1.5)
    env = make(3, authority=authority, horizon=(14, 14))
    env.reset(seed=0)
    executed = np.ones(3)
    for _, actions in zip(range(6), random_actions(3), strict=False):
        *_, info = env.step(actions)
        for i in range(3):
            expected, _ = authority.clip(command(actions[i], authority), executed[i])
            assert (info["lr_scale"][i], info["momentum_scale"][i]) == (expected.lr_scale, expected.momentum_scale)
        executed = info["lr_scale"]
        assert np.array_equal(info["telemetry"]["lr_scale"], executed)


def test_zero_is_exactly_neutral_where_the_ranges_are_symmetric() -> None:
    for low in (1e-2, 0.1, 0.3, 1e-3):
        authority = Authority(lr_scale=(low, 1 / low), momentum_scale=(0.5, 2.0))
        action = command(np.zeros(2), authority)
        assert (action.lr_scale, action.momentum_scale) == (1.0, 1.0)
    assert command(np.float32([1, -1]), DEFAULT_AUTHORITY).lr_scale == 100.0


# -- telemetry ---------------------------------------------------------------------------------------


def test_telemetry_names_are_of_the_table_and_within_its_ranges() -> None:
    env = make(6)
    _, info = env.reset(seed=0)
    seen: dict[str, list[float]] = {}
    for _, actions in zip(range(15), random_actions(6), strict=False):
        assert set(info["telemetry"]) <= set(SIGNALS)
        for name, values in info["telemetry"].items():
            assert values.shape == (6,)
            seen.setdefault(name, []).extend(values)
        *_, info = env.step(actions)
    for name, values in seen.items():
        finite = np.array(values)[~np.isnan(values)]
        assert len(finite) > 0
        assert (finite >= SIGNALS[name].low - 1e-6).all(), name
        assert (finite <= SIGNALS[name].high + 1e-6).all(), name
    assert not np.isnan(seen["loss"]).any()


def test_synthetic_device_goes_missing_and_is_reproducible() -> None:
    def readings() -> np.ndarray:
        device, rngs = SyntheticDevice(8), [np.random.default_rng(i) for i in range(8)]
        device.reset(range(8), rngs, [0.05] * 8)
        return np.array([list(device.read(range(8), rngs).values()) for _ in range(20)])

    a = readings()
    assert np.array_equal(a, readings(), equal_nan=True)
    missing = np.isnan(a).mean(axis=0)  # signal × run
    assert (missing == 1.0).any()  # a sensor that is not there
    assert ((missing > 0.0) & (missing < 0.5)).any()  # one that skips
