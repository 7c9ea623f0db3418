"""The fleet's benchmark does what it says; nothing here is timed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("stable_baselines3", reason="needs the extra lbw-rl[rl]")
pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")

from lbw_rl.envs.families.catalogue import FAMILIES
from lbw_rl.envs.fleet import Fleet, FleetShape
from lbw_rl.envs.proxy_runs import BatchShape
from lbw_rl.envs.proxy_training import ProxyTrainingVectorEnv
from lbw_rl.training_runs.benchmarks import fleet as benchmark
from lbw_rl.training_runs.benchmarks.matmul_floor import matmuls_of
from lbw_rl.training_runs.benchmarks.single_proxy import SingleProxyEnv, plain_llama

TINY = {
    "shape": FleetShape(vocab=16, width=8, heads=1, ffn=8),
    "batch": BatchShape(sequences=2, length=4, held_out=2),
    "horizon": (6, 6),
}


def test_the_single_environment_is_the_vector_environment_of_one_run() -> None:
    """Episode after episode, as `SubprocVecEnv` drives it: reset after every end."""
    single, vector = SingleProxyEnv(**TINY), ProxyTrainingVectorEnv(1, **TINY)
    first, expected = single.reset(seed=3)[0], vector.reset(seed=3)[0]
    assert np.array_equal(first, expected[0])
    ends = 0
    for action in np.random.default_rng(0).uniform(-1, 1, (11, 2)).astype(np.float32):
        observation, reward, terminated, truncated, _ = single.step(action)
        observations, rewards, ended, cut, info = vector.step(action[None])
        assert (reward, terminated, truncated) == (rewards[0], ended[0], cut[0])
        last = info["final_obs"] if terminated or truncated else observations
        assert np.array_equal(observation, last[0])
        if terminated or truncated:
            ends += 1
            assert np.array_equal(single.reset()[0], observations[0])
    assert ends == 3


def test_the_floor_does_exactly_the_products_of_the_gradient() -> None:
    n, rows, d, f, vocab, heads, length = 3, 6, 8, 12, 16, 2, 3
    fleet = Fleet(n, FleetShape(vocab=vocab, width=d, layers=1, heads=heads, ffn=f))
    tokens = torch.zeros(n, rows // length, length + 1, dtype=torch.long)
    products = matmuls_of(lambda: fleet.backward(tokens))
    with FlopCounterMode(display=False) as counted:
        products()
    linear = 3 * 2 * rows * (4 * d * d + 3 * d * f + d * vocab)  # forward, gradient of input, gradient of weight
    attention = 6 * 2 * rows * length * d
    assert counted.get_total_flops() == n * (linear + attention)


def test_the_plain_llama_learns_its_batch() -> None:
    losses = []
    step = plain_llama(FleetShape(vocab=16, width=8, heads=1, ffn=8), BatchShape(sequences=2, length=4))
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, output: losses.append(output.loss.item()) if hasattr(output, "loss") else None
    )
    try:
        for _ in range(40):
            step()
    finally:
        hook.remove()
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "llama"])
def test_every_family_has_a_floor_without_its_preparation(family) -> None:
    """Forward and backward products of two models; a pretrained model's making is none of them."""
    training, floor = benchmark._training(FAMILIES[family], 2)
    with FlopCounterMode(display=False) as whole:
        training()
    with FlopCounterMode(display=False) as counted:
        floor()
    # The counter knows no fused attention on a CPU: two products forward and four backward, eight sequences of 16.
    attention = 2 * 6 * 2 * (8 * 16) * 16 * 32 if family in ("qwen2", "lora", "fine-tuned") else 0
    assert counted.get_total_flops() == whole.get_total_flops() + attention > 0


def test_a_short_benchmark_is_complete_and_resumes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "BLOCK", 8)
    monkeypatch.setattr(benchmark, "HORIZON", 4)
    results = benchmark.benchmark(tmp_path, [2], workers=1, rounds=2)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    (row,) = results["rows"]
    assert row["proxies"] == 2
    assert set(row["steps_per_second"]) == {"fleet", "subproc", "subproc of the workers", "training", "floor", "llama"}
    assert all(value > 0 for value in row["steps_per_second"].values())
    for ratio in row["ratios"].values():
        assert ratio["interval_95"][0] <= ratio["median"] <= ratio["interval_95"][1]
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("measured again"))
    assert benchmark.benchmark(tmp_path, [2], workers=1, rounds=2)["rows"] == results["rows"]


def test_a_block_counts_the_model_steps_of_whole_episodes(monkeypatch) -> None:
    from lbw_rl.training_runs.fleet_vec_env import FleetVecEnv

    monkeypatch.setattr(benchmark, "BLOCK", 30)
    monkeypatch.setattr(benchmark, "HORIZON", 6)
    environment = ProxyTrainingVectorEnv(2, **TINY)
    vector = FleetVecEnv([environment])
    vector.seed(0)
    vector.reset()
    done = []
    monkeypatch.setattr(vector, "step", lambda actions, step=vector.step: done.append(step(actions)[2]) or None)
    assert benchmark._episodes(vector)() == 2 * 2 * 6  # two episodes of two runs: as many as fit into a block
    assert np.array(done).sum() == 4
    assert done[-1].all()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--proxies", "8,none"], "proxies: 'none' must be a whole number, at least 1"),
        (["--rounds", "0"], "rounds: 0 must be a whole number, at least 1"),
        (["--family", "gpt"], "family: 'gpt' is unknown; accepted: llama, qwen2, ngram, quadratic, lora, fine-tuned"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(arguments, complaint, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        benchmark.main(["--out", str(tmp_path / "out"), *arguments])
    assert caught.value.code == 2
    assert complaint in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
