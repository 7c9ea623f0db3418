"""The distribution of tasks: what it covers, what its faults do to the data and the schedule, and its splits."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from lbw_rl.envs.families.catalogue import FAMILIES
from lbw_rl.envs.languages import CORPORA
from lbw_rl.envs.optim import schedule_multiplier
from lbw_rl.envs.proxy_data import BatchShape
from lbw_rl.envs.recipe import ScheduleSpec
from lbw_rl.envs.splits import SPLITS, corpora_of, split
from lbw_rl.envs.tasks import (
    FAULTS,
    MODELS,
    PLAIN,
    SCHEDULES,
    TRAINING_CORPORA,
    TUNED_LR,
    WIDE,
    WIDE_LR_ERROR,
    Tasks,
    Variety,
    sample_tasks,
)

BATCH = BatchShape(sequences=4, length=6, held_out=3)


def one(model: str = "llama", seed: int = 0, **changed: float) -> Tasks:
    """A sound task of 20 steps with these fields changed."""
    task = sample_tasks(np.random.default_rng(seed), 1, horizon=(20, 20), model=model, corpora=("markov-1",))
    for name, value in changed.items():
        getattr(task, name)[0] = value
    return task


def test_tasks_cover_the_stated_distribution() -> None:
    tasks = sample_tasks(np.random.default_rng(0), 4000, multiple=4)
    tuned = tasks.lr_error == 1.0
    assert tuned.mean() == pytest.approx(0.3, abs=0.03)
    errors = np.log10(tasks.lr_error[~tuned])
    assert errors.min() >= -2.0
    assert errors.max() <= 2.0
    assert errors.mean() == pytest.approx(0.0, abs=0.1)
    assert tasks.lr == pytest.approx(TUNED_LR * tasks.lr_error)
    assert (tasks.horizon % 4 == 0).all()
    assert tasks.horizon.min() == 48
    assert tasks.horizon.max() == 128
    assert (tasks.warmup <= 0.1 * tasks.horizon + 1).all()
    assert set(tasks.schedule) == set(range(len(SCHEDULES)))
    assert {CORPORA[i] for i in tasks.corpus} == set(TRAINING_CORPORA)
    assert len(set(tasks.seed)) == 4000


def test_schedules_are_those_of_the_recipes() -> None:
    tasks = sample_tasks(np.random.default_rng(1), 24)
    for i in range(24):
        spec = ScheduleSpec(name=SCHEDULES[tasks.schedule[i]], warmup_steps=int(tasks.warmup[i]))  # type: ignore[arg-type]
        expected = schedule_multiplier(spec, int(tasks.horizon[i]))
        one: Tasks = tasks.take(np.array([i]))
        for step in range(int(tasks.horizon[i]) + 1):
            assert one.learning_rate(np.array([step]))[0] == pytest.approx(one.lr[0] * expected(step), abs=1e-12)


def test_wide_tasks_cover_the_stated_distribution() -> None:
    n = 4000
    tasks = sample_tasks(np.random.default_rng(0), n, lr_error=WIDE_LR_ERROR, variety=WIDE)
    errors = np.log10(tasks.lr_error[tasks.lr_error != 1.0])
    assert (errors.min(), errors.max()) == pytest.approx((-3.0, 2.0), abs=0.02)
    assert (tasks.lr_error == 1.0).mean() == pytest.approx(0.3, abs=0.03)
    assert set(tasks.batch) == set(WIDE.batches)
    assert (tasks.init_scale.min(), tasks.init_scale.max()) == pytest.approx((0.5, 2.0), abs=0.02)
    assert np.median(tasks.init_scale) == pytest.approx(1.0, abs=0.05)
    assert (tasks.label_noise > 0).mean() == pytest.approx(WIDE.noisy, abs=0.03)
    assert tasks.label_noise.max() <= WIDE.label_noise[1]
    assert (tasks.dropout.min(), tasks.dropout.max()) == pytest.approx((0.0, 0.5), abs=0.02)
    assert (tasks.fault > 0).mean() == pytest.approx(WIDE.faulty, abs=0.03)
    shares = np.bincount(tasks.fault[tasks.fault > 0], minlength=len(FAULTS))[1:] / (tasks.fault > 0).sum()
    assert shares == pytest.approx(np.full(3, 1 / 3), abs=0.05)


def test_a_fault_lies_within_the_run_and_has_the_stated_size() -> None:
    tasks = sample_tasks(np.random.default_rng(1), 4000, variety=WIDE)
    start, lasts = tasks.fault_start / tasks.horizon, tasks.fault_end - tasks.fault_start
    for name, longest, factors in (
        ("none", 0, (1.0, 1.0)),
        ("gradient-burst", 3, WIDE.burst),
        ("corrupted-batches", WIDE.corrupted[1], (1.0, 1.0)),
        ("lr-jump", None, WIDE.jump),
    ):
        chosen = tasks.fault == FAULTS.index(name)
        assert chosen.sum() > 100
        assert (start[chosen] >= 0.09).all()
        assert (start[chosen] <= 0.91).all()
        if longest is None:
            assert (tasks.fault_end > tasks.horizon)[chosen].all()
        else:
            assert lasts[chosen].max() == longest
            assert lasts[chosen].min() == (
                0 if name == "none" else min(longest, WIDE.corrupted[0] if longest > 3 else 1)
            )
        assert tasks.fault_factor[chosen].min() == pytest.approx(factors[0], rel=0.1)
        assert tasks.fault_factor[chosen].max() == pytest.approx(factors[1], rel=0.1)


def test_variety_leaves_the_rest_of_the_draw_alone() -> None:
    plain, wide = (sample_tasks(np.random.default_rng(2), 50, variety=v) for v in (PLAIN, WIDE))
    varied = {"batch", "init_scale", "label_noise", "fault", "fault_start", "fault_end", "fault_factor", "dropout"}
    for f in fields(Tasks):
        same = np.array_equal(getattr(plain, f.name), getattr(wide, f.name))
        assert same is (f.name not in varied - {"fault_start"}), f.name


def test_a_jump_multiplies_the_schedule_from_its_step_to_the_end() -> None:
    sound = one(schedule=SCHEDULES.index("cosine"))
    jumped = one(schedule=SCHEDULES.index("cosine"), fault=FAULTS.index("lr-jump"), fault_start=7, fault_end=41)
    jumped.fault_factor[0] = 30.0
    for step in range(21):
        factor = 30.0 if step >= 7 else 1.0
        at = np.array([step])
        assert jumped.learning_rate(at)[0] == pytest.approx(factor * sound.learning_rate(at)[0], rel=1e-12)
        assert jumped.gradient_factor(at)[0] == 1.0


def test_a_burst_multiplies_the_gradient_of_its_steps_alone() -> None:
    burst = one(fault=FAULTS.index("gradient-burst"), fault_start=5, fault_end=7, fault_factor=100.0)
    factors = [burst.gradient_factor(np.array([step]))[0] for step in range(20)]
    assert factors == [1.0] * 5 + [100.0] * 2 + [1.0] * 13
    assert np.array_equal(burst.learning_rate(np.array([6])), one().learning_rate(np.array([6])))


# -- data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "distinct"), [(1.0, 4), (0.5, 2), (0.25, 1), (0.01, 1), (0.8, 2)])
def test_a_smaller_batch_repeats_its_sequences(share: float, distinct: int) -> None:
    train, _ = FAMILIES["llama"].data(one(batch=share), 5, BATCH, None)
    assert train.shape == (5, 4, 7)
    for batch in train:
        assert len({tuple(row.tolist()) for row in batch}) == distinct
    assert torch.equal(train[:, :distinct], train[:, 4 - distinct :])


def test_a_repeated_batch_has_the_gradient_of_the_small_one() -> None:
    from lbw_rl.envs.fleet import Fleet

    fleet = Fleet(1)
    fleet.reset([0], [np.random.default_rng(0)])
    train, _ = FAMILIES["llama"].data(one(batch=0.25), 1, BATCH, None)
    loss = fleet.backward(train)
    gradient = fleet.grads.clone()
    assert fleet.backward(train[:, :1]) == pytest.approx(loss, rel=1e-6)
    assert torch.allclose(fleet.grads, gradient, atol=1e-7)


def test_corrupted_batches_are_random_tokens_for_their_steps_alone() -> None:
    sound, held_out = FAMILIES["llama"].data(one(), 20, BATCH, None)
    fault = {"fault": FAULTS.index("corrupted-batches"), "fault_start": 4, "fault_end": 9}
    corrupted, same = FAMILIES["llama"].data(one(**fault), 20, BATCH, None)
    differs = (corrupted != sound).flatten(1).double().mean(1)
    assert (differs[4:9] > 0.9).all()
    assert not differs[:4].any()
    assert not differs[9:].any()
    assert torch.equal(held_out, same)


def test_label_noise_replaces_its_share_of_training_tokens_and_no_held_out_one() -> None:
    shape = BatchShape(sequences=8, length=16, held_out=8)
    sound, held_out = FAMILIES["llama"].data(one(), 200, shape, None)
    noisy, same = FAMILIES["llama"].data(one(label_noise=0.2), 200, shape, None)
    assert (noisy != sound).double().mean().item() == pytest.approx(0.2 * 63 / 64, abs=0.01)
    assert torch.equal(held_out, same)


def test_faults_of_a_quadratic_move_its_minimum_elsewhere() -> None:
    shape = FAMILIES["quadratic"]
    sound, _ = shape.data(one("quadratic"), 20, BATCH, None)
    fault = {"fault": FAULTS.index("corrupted-batches"), "fault_start": 4, "fault_end": 9}
    moved, held_out = shape.data(one("quadratic", **fault), 20, BATCH, None)
    assert torch.equal(moved[:4], sound[:4])
    assert torch.equal(moved[9:], sound[9:])
    assert moved[4:9].std().item() == pytest.approx(1.0, abs=0.05)
    noisy, _ = shape.data(one("quadratic", label_noise=0.1), 20, BATCH, None)
    assert (noisy != sound).double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert not held_out.any()


# -- splits ------------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_every_task_is_in_one() -> None:
    """All pairs of model and corpus, held against what may be sampled for each split."""
    cells = {name: set() for name in SPLITS}
    for model in MODELS:
        for name in SPLITS:
            try:
                corpora = corpora_of(model, name, text=True, tokens=True)
            except ValueError:
                continue
            tasks = sample_tasks(np.random.default_rng(0), 200, model=model, corpora=corpora)
            assert set(split(tasks)) == {SPLITS.index(name)}
            assert {CORPORA[i] for i in tasks.corpus} == set(corpora)
            cells[name] |= {(model, corpus) for corpus in corpora}
    train, validation, test = (cells[name] for name in SPLITS)
    assert not train & validation
    assert not train & test
    assert not validation & test
    readers = [m for m in MODELS if m != "quadratic"]
    assert train | validation | test >= {(m, c) for m in readers for c in CORPORA}


def test_what_is_reserved_for_later_never_occurs_earlier() -> None:
    parts = {}
    for model in MODELS:
        for name in SPLITS:
            try:
                corpora = corpora_of(model, name)
            except ValueError:
                continue
            parts.setdefault(name, set()).update({model, *corpora})
    assert parts["train"] == {"llama", "ngram", "quadratic", "fine-tuned", *TRAINING_CORPORA}
    assert parts["validation"] - parts["train"] == {"qwen2", "grammar"}
    assert not parts["validation"] & {"lora", "brackets"}
    assert {"lora", "brackets"} <= parts["test"]


def test_a_split_without_tasks_is_refused() -> None:
    for model, name, accepted in (
        ("qwen2", "train", "validation, test"),
        ("lora", "validation", "test"),
        ("quadratic", "test", "train"),
    ):
        with pytest.raises(ValueError, match=f"of {model}; accepted: {accepted}$"):
            corpora_of(model, name)
    with pytest.raises(ValueError, match="split='dev' is unknown; accepted: train, validation, test"):
        corpora_of("llama", "dev")


def test_a_variety_of_ones_own() -> None:
    tasks = sample_tasks(np.random.default_rng(0), 200, variety=Variety(faulty=1.0, jump=(2.0, 2.0)))
    assert (tasks.fault > 0).all()
    assert tasks.fault_factor[tasks.fault == FAULTS.index("lr-jump")] == pytest.approx(2.0)
