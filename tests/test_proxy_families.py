"""`lbw_rl/ProxyTraining-v0` with every family of models, wide tasks, faults, splits and a text of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

import lbw_rl.envs  # noqa: F401 (registers the ids)
from lbw_rl.envs.families.catalogue import FAMILIES
from lbw_rl.envs.families.fine_tuned import FineTunedShape
from lbw_rl.envs.families.lora import LoRAShape
from lbw_rl.envs.families.ngram import NGramShape
from lbw_rl.envs.families.quadratic import QuadraticShape
from lbw_rl.envs.fleet import FleetShape
from lbw_rl.envs.governed_proxies import GovernedProxies
from lbw_rl.envs.interface import DEFAULT_AUTHORITY
from lbw_rl.envs.languages import CORPORA
from lbw_rl.envs.proxy_runs import BatchShape, ProxyData
from lbw_rl.envs.proxy_training import ProxyTrainingVectorEnv
from lbw_rl.envs.splits import SPLITS, split
from lbw_rl.envs.tasks import FAULTS, WIDE, WIDE_LR_ERROR, Tasks, sample_tasks

LLAMA = FleetShape(vocab=16, width=8, heads=1, ffn=8)
SHAPES = {
    "llama": LLAMA,
    "qwen2": FleetShape(vocab=16, width=8, heads=1, ffn=8, qkv_bias=True),
    "ngram": NGramShape(vocab=16, context=2, width=4, hidden=8),
    "quadratic": QuadraticShape(rows=8, columns=8),
    "lora": LoRAShape(LLAMA, rank=2, pretraining_steps=20),
    "fine-tuned": FineTunedShape(LLAMA, pretraining_steps=20),
}
BATCH = BatchShape(sequences=2, length=4, held_out=2)
every_family = pytest.mark.parametrize("name", SHAPES)


def make(name: str = "llama", num_envs: int = 6, **arguments: Any) -> ProxyTrainingVectorEnv:
    first = {"qwen2": "validation", "lora": "test"}.get(name, "train")
    settings = {"batch": BATCH, "horizon": (8, 20), "split": first, **arguments}
    return ProxyTrainingVectorEnv(num_envs, shape=SHAPES[name], **settings)


@every_family
def test_neutral_actions_earn_exactly_zero_whatever_befalls_the_run(name: str) -> None:
    """The governed twin is the base run bit for bit: faults, noise, divergence and restarts included."""
    env = make(name, variety=WIDE, lr_error=WIDE_LR_ERROR)
    env.reset(seed=0)
    finished = faulty = 0
    for _ in range(25):
        observations, rewards, terminated, truncated, info = env.step(np.zeros((6, 2), dtype=np.float32))
        assert (rewards == 0.0).all()
        assert observations in env.observation_space
        if (done := terminated | truncated).any():
            finished += done.sum()
            faulty += (info["final_info"]["task"]["fault"][done] > 0).sum()
    assert finished > 10
    assert faulty > 2


@every_family
def test_a_well_tuned_run_learns(name: str) -> None:
    """At the family's tuned rate the default proxy gets well below its initial loss within its horizon."""
    family = FAMILIES[name]
    settings = {"tuned_lr": family.tuned_lr, "well_tuned": 1.0, "model": name, "corpora": ("markov-1", "markov-2")}
    tasks = sample_tasks(np.random.default_rng(0), 4, horizon=(96, 96), **settings)
    data = ProxyData(4, 96, family, BatchShape(held_out=16))
    data.put(range(4), tasks)
    proxies = GovernedProxies(data, DEFAULT_AUTHORITY, 1, rule=None)
    proxies.start(range(4))
    initial = proxies.runs.held_out_losses()
    final = proxies.left_alone(range(4))
    assert (final < initial - 0.3).all()
    assert np.mean(initial - final) > 0.8


@pytest.mark.parametrize("fault", FAULTS[1:])
def test_what_a_run_would_still_reach_counts_its_faults(fault: str) -> None:
    """`left_alone` from midway equals going on, with a fault that is still to come."""
    tasks = sample_tasks(np.random.default_rng(5), 2, horizon=(16, 16), well_tuned=1.0)
    tasks.fault[1], tasks.fault_start[1], tasks.fault_end[1] = FAULTS.index(fault), 9, 12
    tasks.fault_factor[1] = 50.0
    sound = sample_tasks(np.random.default_rng(5), 2, horizon=(16, 16), well_tuned=1.0)
    final = {}
    for label, each in (("faulty", tasks), ("sound", sound)):
        data = ProxyData(2, 16, LLAMA, BATCH)
        data.put([0, 1], each)
        proxies = GovernedProxies(data, DEFAULT_AUTHORITY, 1, rule=None)
        proxies.start([0, 1])
        foretold = None
        for step in range(16):
            if step == 6:
                foretold = proxies.left_alone([0, 1])
            proxies.advance()
        final[label] = proxies.runs.held_out_losses()
        assert foretold == pytest.approx(final[label], rel=1e-5)
    assert final["faulty"][0] == final["sound"][0]
    assert abs(final["faulty"][1] - final["sound"][1]) > 1e-3


def telemetry_of(tasks: Tasks, decisions: int, **arguments: Any) -> list[dict[str, np.ndarray]]:
    env = make("llama", len(tasks), base_run=False, horizon=(16, 16), **arguments)
    seen = [env.reset(seed=0, options={"tasks": tasks})[1]["telemetry"]]
    for _ in range(decisions):
        seen.append(env.step(np.zeros((len(tasks), 2), dtype=np.float32))[-1]["telemetry"])
    return seen


def test_faults_are_seen_in_the_telemetry() -> None:
    def tasks(fault: str) -> Tasks:
        each = sample_tasks(np.random.default_rng(1), 1, horizon=(16, 16), well_tuned=1.0)
        each.fault[0], each.fault_start[0], each.fault_end[0], each.fault_factor[0] = FAULTS.index(fault), 6, 8, 40.0
        return each

    seen = {fault: telemetry_of(tasks(fault), 6) for fault in FAULTS}

    def signal(fault: str, name: str) -> np.ndarray:
        return np.array([t[name][0] for t in seen[fault]])

    burst = signal("gradient-burst", "grad_norm") / signal("none", "grad_norm")
    assert burst[:3] == pytest.approx(1.0)
    assert burst[3] == pytest.approx(40.0, rel=1e-4)  # the gradient of step 6
    assert signal("lr-jump", "learning_rate")[3] == pytest.approx(40.0 * signal("none", "learning_rate")[3])
    corrupted = signal("corrupted-batches", "loss") - signal("none", "loss")
    assert not corrupted[:3].any()
    assert corrupted[3] != 0.0


def test_lost_readings_follow_the_task() -> None:
    device = ("gpu_utilization", "gpu_memory", "gpu_power", "tokens_per_second")
    missing = {}
    for dropout in (0.0, 0.5, 1.0):
        tasks = sample_tasks(np.random.default_rng(1), 40, horizon=(16, 16))
        tasks.dropout[:] = dropout
        readings = np.array([[t[name] for name in device] for t in telemetry_of(tasks, 7)])
        lost = np.isnan(readings).mean(axis=0)  # device signal × run
        missing[dropout] = lost[lost < 1.0]
        assert not np.isnan([t["loss"] for t in telemetry_of(tasks, 1)]).any()
    assert (missing[0.0] == 0.0).all()
    assert missing[0.5].mean() == pytest.approx(0.5, abs=0.1)
    assert missing[1.0].size == 0


@pytest.mark.parametrize(("name", "chosen"), [("llama", "validation"), ("qwen2", "test"), ("lora", "test")])
def test_an_environment_draws_the_tasks_of_its_split(name: str, chosen: str) -> None:
    env = make(name, 8, split=chosen)
    env.reset(seed=0)
    for _ in range(12):
        *_, terminated, truncated, info = env.step(np.zeros((8, 2), dtype=np.float32))
        if (done := terminated | truncated).any():
            tasks = Tasks(**{field: values[done] for field, values in info["final_info"]["task"].items()})
            assert (split(tasks) == SPLITS.index(chosen)).all()


def test_a_text_of_ones_own_joins_the_training_corpora(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    env = make("llama", 40, text=path)
    env.reset(seed=0)
    corpora = {CORPORA[i] for i in env._data.tasks.corpus}
    assert corpora == {"markov-1", "markov-2", "python-docs", "file"}
    with pytest.raises(ValueError, match=r"text=/nowhere.txt is no file; accepted: the path of a UTF-8 text file"):
        make("llama", text="/nowhere.txt")


def test_corpora_of_ones_own_choice_are_all_there_is() -> None:
    env = make("llama", 20, corpora=("markov-2",))
    env.reset(seed=0)
    assert {CORPORA[i] for i in env._data.tasks.corpus} == {"markov-2"}
    for name in ("brackets", "latin"):  # of the test split; of none
        with pytest.raises(ValueError, match=f"corpora: '{name}' makes no train tasks of llama; accepted: markov-1, "):
            make("llama", corpora=(name,))
    with pytest.raises(ValueError, match="corpora: none given; accepted: one or more of markov-1, "):
        make("llama", corpora=())


def test_bad_splits_and_tasks_of_another_family_are_refused() -> None:
    with pytest.raises(ValueError, match="split='train': there are no such tasks of qwen2; accepted: validation, test"):
        make("qwen2", split="train")
    env = make("ngram", 2)
    with pytest.raises(ValueError, match=r"tasks.model \[0 0\] must be 2 \(ngram\)"):
        env.reset(seed=0, options={"tasks": sample_tasks(np.random.default_rng(0), 2, horizon=(8, 8))})


def test_a_family_by_gymnasiums_registry() -> None:
    env = gymnasium.make_vec(
        "lbw_rl/ProxyTraining-v0",
        num_envs=2,
        vectorization_mode="vector_entry_point",
        shape=SHAPES["quadratic"],
        batch=BATCH,
        horizon=(8, 8),
    )
    assert env.reset(seed=0)[0] in env.observation_space
    env.close()


def test_fleets_of_several_families_learn_side_by_side() -> None:
    """One `VecEnv` for stable-baselines3: each family is a batched program of its own."""
    pytest.importorskip("stable_baselines3")
    from lbw_rl.training_runs.fleet_vec_env import FleetVecEnv

    names = ("llama", "ngram", "quadratic")
    vector = FleetVecEnv([make(name, 2) for name in names])
    alone = [make(name, 2) for name in names]
    try:
        vector.seed(4)
        together = vector.reset()
        apart = [env.reset(seed=[4 + 2 * i, 5 + 2 * i])[0] for i, env in enumerate(alone)]
        assert np.array_equal(together, np.concatenate(apart))
        for actions in np.random.default_rng(0).uniform(-1, 1, (12, 6, 2)).astype(np.float32):
            observations, rewards, _, _ = vector.step(actions)
            steps = [env.step(actions[2 * i : 2 * i + 2]) for i, env in enumerate(alone)]
            assert np.array_equal(observations, np.concatenate([s[0] for s in steps]))
            assert np.array_equal(rewards, np.concatenate([s[1] for s in steps]).astype(np.float32))
    finally:
        vector.close()


@every_family
def test_a_rule_governs_every_family_and_zero_leaves_it_to_the_rule(name: str) -> None:
    """Faults included: what the rule skips is skipped in both runs."""
    env = make(name, variety=WIDE, lr_error=WIDE_LR_ERROR, rule="lbw-guard")
    env.reset(seed=1)
    scales = set()
    for _ in range(25):
        observations, rewards, _, _, info = env.step(np.zeros((6, 2), dtype=np.float32))
        assert (rewards == 0.0).all()
        assert observations in env.observation_space
        scales.update(info["lr_scale"])
    assert len(scales) > 30
