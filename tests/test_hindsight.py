"""Trials under random multiples, and what hindsight makes of them: effects with known answers, no effect, no trust far away."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lbw_rl.envs.fleet import FleetShape
from lbw_rl.envs.interface import DEFAULT_AUTHORITY
from lbw_rl.envs.mixture import MIXTURES, ProxyKind
from lbw_rl.envs.proxy_runs import BatchShape
from lbw_rl.features import FEATURES
from lbw_rl.policy import load_policy
from lbw_rl.training_runs import hindsight, trials_stage
from lbw_rl.training_runs.fleet_vec_env import FleetVecEnv
from lbw_rl.training_runs.freeze import train_and_freeze
from lbw_rl.training_runs.hindsight import BLOCK, STRETCHES, Hindsight, Trials, gather, learn
from lbw_rl.training_runs.policy_evaluation import Judge
from lbw_rl.training_runs.policy_training import CURVE_FILE, PPOSettings, TrainingResult, train
from lbw_rl.training_runs.trials_stage import TRIALS_FILE

TINY = ProxyKind(
    shape=FleetShape(vocab=16, width=8, heads=1, ffn=8),
    batch=BatchShape(sequences=2, length=4, held_out=2),
    horizon=(40, 56),
)
N = len(FEATURES)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that do not ask how good the actor is."""
    monkeypatch.setattr(hindsight, "_STEPS", 50)


# -- the fit -----------------------------------------------------------------------------------------


def trials(effect: float, noise: float = 0.05, blocks: int = 500) -> Trials:
    """gain = 0.1·x₁ + effect·(x₀·u₀ − u₀²/2) + noise: the best u₀ is x₀, and u₁ has no effect."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3 * blocks, N)).astype(np.float32)
    u = rng.uniform(-1, 1, (3 * blocks, 2)).astype(np.float32)
    gains = 0.1 * x[:, 1] + effect * (x[:, 0] * u[:, 0] - u[:, 0] ** 2 / 2) + noise * rng.normal(size=3 * blocks)
    return Trials(x, u, gains.astype(np.float64), np.repeat(np.arange(blocks), 3))


def actions(found: Hindsight, x: np.ndarray) -> np.ndarray:
    return found.act(x)


def test_hindsight_finds_the_action_that_pays_where_it_pays() -> None:
    found = learn(trials(effect=0.2), seed=0)
    x = np.random.default_rng(1).normal(size=(500, N)).astype(np.float32)
    u = actions(found, x)
    best = x[:, 0].clip(-1, 1)
    assert np.corrcoef(u[:, 0], best)[0, 1] > 0.9
    assert np.abs(u[:, 0] - best).mean() < 0.25
    assert (u[:, 1] == 0.0).all()  # momentum is the rule's
    assert found.report["blocks"] == 500
    assert len(found.report["fits"]) == 10
    for fit in found.report["fits"]:
        assert fit["slope"] == pytest.approx(1.0, abs=0.25)
        assert fit["loss"] < 0.7 * fit["loss_without_effects"]


def test_where_there_is_no_effect_the_rule_is_left_alone() -> None:
    found = learn(trials(effect=0.0), seed=0)
    x = np.random.default_rng(1).normal(size=(500, N)).astype(np.float32)
    assert np.abs(actions(found, x)).mean() < 0.15


def test_the_farther_from_the_trials_the_less_it_dares() -> None:
    """What lies far away in features that had no effect: the fits part, and none of them can vouch for it."""
    found = learn(trials(effect=0.1, noise=0.1, blocks=300), seed=0)
    x = np.random.default_rng(1).normal(size=(500, N)).astype(np.float32)
    near, far = x.copy(), x.copy()
    far[:, 2:] *= 4.0
    assert np.abs(actions(found, far)[:, 0]).mean() < 0.8 * np.abs(actions(found, near)[:, 0]).mean()


@pytest.mark.usefixtures("hasty")
def test_hindsight_is_the_same_for_the_same_seed() -> None:
    one, other, another = (learn(trials(0.2, blocks=20), seed, epochs=2) for seed in (3, 3, 4))
    for a, b, c in zip(one.actor.layers, other.actor.layers, another.actor.layers, strict=True):
        assert np.array_equal(a[0], b[0])
        assert not np.array_equal(a[0], c[0])


def test_fits_side_by_side_do_not_touch_one_another() -> None:
    told = trials(0.2, blocks=30)
    x, u, gains = (torch.from_numpy(a.astype(np.float32)) for a in (told.observations, told.actions, told.gains))
    thirds = torch.from_numpy(told.blocks % 3)
    parts = [
        hindsight._fit(x, u, gains, torch.stack([thirds == 0, thirds == k]), 3, torch.Generator().manual_seed(0))
        for k in (1, 2)
    ]
    (one, reports), (other, others) = parts
    assert reports[0] == others[0]
    for a, b in zip(one.parameters, other.parameters, strict=True):
        assert torch.equal(a[0], b[0])
        assert not torch.equal(a[1], b[1])


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="trials: 4 finished blocks are too few"):
        learn(trials(0.1, blocks=4), seed=0)


# -- gathering ---------------------------------------------------------------------------------------


def fleet(n: int = 8) -> FleetVecEnv:
    return FleetVecEnv([TINY.fleet(n, authority=DEFAULT_AUTHORITY, decide_every=4, base_run=False, rule="lbw-guard")])


class Watched(FleetVecEnv):
    """Remembers what was done, and what came back."""

    def step_async(self, actions: np.ndarray) -> None:
        self.__dict__.setdefault("done", []).append(actions)
        super().step_async(actions)

    def step_wait(self):  # type: ignore[no-untyped-def]
        result = super().step_wait()
        self.__dict__.setdefault("ends", []).append([info.get("episode") for info in result[3]])
        return result


def test_trials_hold_what_was_executed_and_how_the_runs_ended() -> None:
    env = Watched(fleet().environments)
    told: list[tuple[int, int]] = []
    found = gather(env, 8 * 40, seed=5, progress=lambda done, runs: told.append((done, runs)))
    blocks = found.blocks.max() + 1
    assert told[-1] == (8 * 40, BLOCK * blocks)
    assert (np.stack(env.done)[0] == 0.0).all()  # type: ignore[attr-defined]
    ended: dict[tuple[int, int], list[tuple[list[np.ndarray], float]]] = {}
    order: list[tuple[int, int]] = []
    under_way: list[list[np.ndarray]] = [[] for _ in range(8)]
    count = [0] * 8
    for taken, ends in zip(env.done, env.ends, strict=True):  # type: ignore[attr-defined]
        for i in range(8):
            under_way[i].append(taken[i])
            if ends[i] is not None:
                key = (i // BLOCK, count[i])
                ended.setdefault(key, []).append((under_way[i], ends[i]["r"]))
                order += [key] if len(ended[key]) == BLOCK else []
                under_way[i], count[i] = [], count[i] + 1
    assert len(order) == blocks > 4
    for number, key in enumerate(order):
        rows = np.flatnonzero(found.blocks == number)
        expected = []
        for k, (executed, result) in enumerate(ended[key]):
            assert (executed[0] == 0.0).all()
            others = np.mean([r for j, (_, r) in enumerate(ended[key]) if j != k])
            held = [u for i, u in enumerate(executed[1:]) if i == 0 or (u != executed[i]).any()]
            assert 1 <= len(held) <= STRETCHES
            expected += [(u, result - others) for u in held]
        assert np.array_equal(found.actions[rows], [u for u, _ in expected])
        assert found.gains[rows] == pytest.approx([g for _, g in expected])
    assert np.abs(found.actions).max() <= 1.0


def test_runs_of_a_block_differ_in_their_multiples_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With none, they end alike to the last bit, whatever the runs before them were; two blocks do not."""

    def neutral(self: object, observation: np.ndarray) -> np.ndarray:
        self.starts[0] = (observation, np.zeros(2, dtype=np.float32))  # type: ignore[attr-defined]
        return np.zeros(2, dtype=np.float32)

    monkeypatch.setattr(hindsight._Trial, "action", neutral)
    env = Watched(fleet().environments)
    found = gather(env, 8 * 40, seed=5)
    assert len(found.gains) > 16
    assert np.abs(found.gains).max() < 1e-12
    returns = [[e["r"] for e in ends if e is not None] for ends in env.ends]  # type: ignore[attr-defined]
    assert len({round(r, 12) for part in returns for r in part}) == found.blocks.max() + 1


def test_a_fleet_of_no_whole_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"env: fleets of \[6\] runs; accepted: multiples of 4"):
        gather(fleet(6), 100, seed=0)


def test_trials_come_back_from_their_file_and_from_no_other_training(tmp_path: Path) -> None:
    found = gather(fleet(), 8 * 30, seed=5)
    found.save(tmp_path / "trials.npz", {"seed": 5})
    again = Trials.load(tmp_path / "trials.npz", {"seed": 5})
    for name in Trials.__slots__:
        assert np.array_equal(getattr(found, name), getattr(again, name))
    with pytest.raises(ValueError, match=r"trials\.npz: is of another training: seed differ"):
        Trials.load(tmp_path / "trials.npz", {"seed": 6})
    both = Trials.joined([found, again])
    assert both.blocks.max() + 1 == 2 * (found.blocks.max() + 1)
    assert len(both) == 2 * len(found)


# -- within a training -------------------------------------------------------------------------------

SHORT = PPOSettings(n_steps=4, batch_size=12, n_epochs=1, rollouts_per_segment=2)


def short(out: Path, decisions: int = 0, **options: object) -> TrainingResult:
    arguments = {
        "settings": SHORT,
        "mixture": ((TINY, 6),),
        "rule": "lbw-guard",
        "trials": 800,
        "proxies": 2,
        **options,
    }
    return train(decisions, 3, out, **arguments)  # type: ignore[arg-type]


@pytest.mark.usefixtures("hasty")
def test_a_training_that_died_among_its_trials_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials_stage, "TRIALS_PER_PART", 400)
    whole = short(tmp_path / "whole")
    assert whole.provenance["trials"] == 800
    assert whole.provenance["hindsight"]["blocks"] >= 5

    class Killed(Exception):
        pass

    told: list[str] = []

    def die(record: dict[str, float]) -> None:
        told.extend(name for name in record if name not in (*told[-1:], "decisions"))
        if record["decisions"] > 600:
            raise Killed

    with pytest.raises(Killed):
        short(tmp_path / "died", progress=die)
    assert told == ["runs", "stretches", "judged", "runs"]
    assert [p.name for p in (tmp_path / "died").glob("*.npz")] == [TRIALS_FILE.format(0)]
    seen: list[float] = []
    again = short(tmp_path / "died", resume=True, progress=lambda record: seen.append(record["decisions"]))
    assert min(seen) > 400  # the first part is not run again
    curves = [(tmp_path / name / CURVE_FILE).read_text() for name in ("whole", "died")]
    assert curves[0] == curves[1]
    lines = [json.loads(line) for line in curves[0].splitlines()]
    assert [line["decisions"] for line in lines] == [400, 800]
    assert lines[0]["runs"] < lines[1]["runs"] == BLOCK * whole.provenance["hindsight"]["blocks"]
    judge = Judge(2, kinds=(TINY,), authority=DEFAULT_AUTHORITY, decide_every=4, rule="lbw-guard")
    fresh = judge(lambda x: whole.actor((x - whole.mean) / whole.std), stretches=STRETCHES)
    assert whole.stretches == STRETCHES
    assert lines[1]["gain"] == pytest.approx(fresh.summary()["gain"], abs=1e-6)
    for a, b in zip(whole.actor.layers, again.actor.layers, strict=True):
        assert np.array_equal(a[0], b[0])
        assert np.array_equal(a[1], b[1])
    with pytest.raises(ValueError, match="is of another training: decide_every differ"):
        short(tmp_path / "died", resume=True, decide_every=2)


@pytest.mark.usefixtures("hasty")
def test_ppo_begins_with_what_hindsight_told(tmp_path: Path) -> None:
    """At a rate of nothing it ends with that, too; and its critic and normaliser are its own."""
    alone = short(tmp_path / "alone")
    both = short(tmp_path / "both", decisions=48, settings=replace(SHORT, learning_rate=1e-12))
    x = np.random.default_rng(0).normal(size=(50, N))
    ours, theirs = ((x - r.mean) / r.std for r in (alone, both))
    assert alone.actor(ours) == pytest.approx(both.actor(theirs), abs=1e-4)
    assert (both.decisions, alone.decisions) == (48, 0)
    assert (both.stretches, alone.stretches) == (None, STRETCHES)
    assert not np.array_equal(both.mean, alone.mean)
    curve = [json.loads(line)["decisions"] for line in (tmp_path / "both" / CURVE_FILE).read_text().splitlines()]
    assert curve == [800, 824, 848]
    moved = short(tmp_path / "moved", decisions=48)
    assert moved.actor((x - moved.mean) / moved.std) != pytest.approx(alone.actor(ours), abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"trials": 0},
            r"decisions=0 \(--decisions\), trials=0 \(--trials\): none may be negative, and one must be at least 1",
        ),
        ({"trials": -1, "decisions": 5}, "trials=-1"),
        ({"rule": None}, "trials=800 need a rule"),
    ],
)
def test_a_training_of_nothing_is_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        short(tmp_path, **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("hasty")
def test_the_card_says_how_it_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXTURES, "tiny", ((TINY, 6),))
    found = train_and_freeze(
        tmp_path, decisions=0, trials=600, rule="lbw-guard", mixture="tiny", settings=SHORT, proxies=4
    )
    card = (tmp_path / "CARD.md").read_text(encoding="utf-8")
    assert "Learned in hindsight from 600 decisions of trials under random multiples." in card
    assert "**Training data.** 600 decisions" in card
    assert "| 100% | llama | 16, 8, 1 | 2 × 4 | 40–56 | 0% | 0% | markov-1, markov-2, python-docs |" in card
    assert "It answers 3 times in a run and holds each answer" in card
    assert [load_policy(folder).header.stretches for folder in (tmp_path, tmp_path / "untrained")] == [STRETCHES] * 2
    assert "hindsight" in load_policy(tmp_path).header.provenance
    assert "hindsight" not in load_policy(tmp_path / "untrained").header.provenance
    assert found["decisions"] == 0
    assert not list(tmp_path.glob("*.npz"))
