"""The benchmarks do what they say, on models of a few thousand weights; nothing here is timed."""

import json
import math

import pytest
import torch

from lbw_rl.envs.recipe import Recipe, load_recipe, override
from lbw_rl.envs.task import TrainingTask
from lbw_rl.governor import Governor

pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")

from lbw_rl.training_runs.benchmarks import faults, overhead
from lbw_rl.training_runs.benchmarks.records import Rows, fingerprint, median_interval, refuse_faults

STEPS, AT = 20, 4


@pytest.fixture
def recipe(tiny) -> Recipe:
    return override(load_recipe("mini-qwen2"), [*tiny, f"train.steps={STEPS}"])


@pytest.fixture
def steps(recipe):
    """Runs a task with a fault at step `AT` and gives what `look(task)` sees between backward and advance."""

    def record(fault, look, *settings):
        task = TrainingTask(override(recipe, settings))
        seen = []
        while task.step < task.total_steps:
            if task.step == AT:
                faults.FAULTS[fault](task)
            loss, norm = task.backward()
            seen.append(look(task, loss, norm))
            task.advance()
        return seen

    return record


def gradients(task):
    return [p.grad for p in task.model.parameters()]


def norm_of(task, loss, norm):
    return float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients(task)])))


# ---- faults


@pytest.mark.parametrize("clip", ["none", "1.0"])
def test_nan_gradient_is_there_at_one_step_alone(steps, clip):
    seen = steps(
        "nan-gradient", lambda task, *_: [bool(g.isnan().any()) for g in gradients(task)], f"optimizer.grad_clip={clip}"
    )
    assert not any(any(step) for step in seen[:AT])
    first, *others = seen[AT]
    assert first
    # Clipping spreads it to every gradient, as it does in practice.
    assert all(others) if clip != "none" else not any(others)


def test_after_a_nan_gradient_that_was_skipped_the_gradients_are_sound(recipe):
    task = TrainingTask(recipe)
    faults.nan_gradient(task)
    poisoned = []
    for _ in range(3):
        task.backward()
        poisoned.append(any(bool(g.isnan().any()) for g in gradients(task)))
        task.step += 1  # as if the update had been skipped
    assert poisoned == [True, False, False]


@pytest.mark.parametrize("clip", ["none", "1.0"])
def test_gradient_burst_multiplies_one_step_before_the_norm_is_measured(steps, clip):
    setting = f"optimizer.grad_clip={clip}"
    measure = norm_of if clip == "none" else (lambda task, loss, norm: float(norm))
    clean, burst = steps("none", measure, setting), steps("gradient-burst", measure, setting)
    assert burst[:AT] == clean[:AT]
    assert burst[AT] == pytest.approx(faults.BURST * clean[AT], rel=1e-4)
    assert max(burst[AT + 1 :]) < 100 * max(clean)
    if clip != "none":
        assert steps("gradient-burst", norm_of, setting)[AT] == pytest.approx(1.0, rel=1e-3)


def test_accumulated_gradients_burst_as_a_whole(steps):
    setting = "train.accumulation=3"
    clean, burst = steps("none", norm_of, setting), steps("gradient-burst", norm_of, setting)
    assert burst[AT] == pytest.approx(faults.BURST * clean[AT], rel=1e-4)


def test_corrupted_batches_changes_ten_batches_and_no_other(recipe):
    def read(fault):
        task = TrainingTask(recipe)
        batches = []
        while task.step < task.total_steps:
            if task.step == AT:
                faults.FAULTS[fault](task)
                # Registered after the fault's own hook, so that it sees what the model gets.
                task.model.register_forward_pre_hook(lambda m, a, k: batches.append(k), with_kwargs=True)
            task.backward()
            task.evaluate()
            task.advance()
        return batches

    clean, corrupted = read("none"), read("corrupted-batches")
    assert all(torch.equal(batch["input_ids"], batch["labels"]) for batch in corrupted)
    differ = [not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(clean, corrupted, strict=True)]
    # Training batch and held-out batch take turns; held-out text is never touched.
    assert differ[0::2] == [True] * faults.CORRUPTED_BATCHES + [False] * (STEPS - AT - faults.CORRUPTED_BATCHES)
    assert not any(differ[1::2])
    vocabulary = recipe.data.vocab_size
    assert all(0 <= int(b["input_ids"].min()) <= int(b["input_ids"].max()) < vocabulary for b in corrupted)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_lr_jump_multiplies_every_rate_from_then_on(steps, schedule):
    def rates(task, *_):
        return [group["lr"] for group in task.optimizer.param_groups]

    setting = f"schedule.name={schedule}"
    clean, jumped = steps("none", rates, setting), steps("lr-jump", rates, setting)
    for step, (before, after) in enumerate(zip(clean, jumped, strict=True)):
        factor = 1.0 if step < AT else faults.LR_JUMP
        assert after == pytest.approx([factor * lr for lr in before], rel=1e-9)


def test_optimizer_zeroed_empties_the_moments_once_and_keeps_the_count(steps):
    def moments(task, *_):
        states = list(task.optimizer.state.values())
        empty = [not s[name].any() for s in states for name in ("exp_avg", "exp_avg_sq")]
        return bool(empty) and all(empty), [float(s["step"]) for s in states]

    seen = steps("optimizer-zeroed", moments)
    assert [step for step, (empty, _) in enumerate(seen) if empty] == [AT]
    assert set(seen[AT][1]) == {float(AT)}


# ---- the fault benchmark


def test_a_tiny_benchmark_is_complete_and_resumes(tiny, tmp_path, in_process, monkeypatch, capsys):
    sets = [part for setting in tiny for part in ("--set", setting)]
    command = ["--out", str(tmp_path), "--seeds", "2", "--steps", str(STEPS), "--arms", "adamw,lbw-guard", *sets]
    faults.main([*command, "--faults", "nan-gradient"])
    assert "nan-gradient" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"cpu", "cores", "torch_threads", "versions"} <= results["machine"].keys()
    cells = [(row["fault"], row["arm"], row["seed"]) for row in results["rows"]]
    assert cells == [(f, a, s) for s in (0, 1) for f in ("none", "nan-gradient") for a in ("adamw", "lbw-guard")]
    by_arm = {entry["arm"]: entry for entry in results["summary"] if entry["fault"] == "nan-gradient"}
    assert by_arm["adamw"]["diverged"] == 2
    assert by_arm["lbw-guard"]["skips"] == 2
    assert by_arm["lbw-guard"]["diverged"] == 0
    assert by_arm["lbw-guard"]["seeds"] == 2
    lost = next(row for row in results["rows"] if row["diverged"])
    assert lost["final_loss"] == lost["initial_loss"]
    governed = next(r for r in results["rows"] if r["arm"] == "lbw-guard" and r["fault"] == "nan-gradient")
    assert [STEPS // 2, STEPS // 2, "non-finite", "skip"] in governed["governor"]["events"]

    ran = []
    real = faults.run_cell
    monkeypatch.setattr(faults, "run_cell", lambda cell: ran.append((cell.fault, cell.recipe.train.seed)) or real(cell))
    faults.main([*command, "--faults", "nan-gradient"])
    assert ran == []
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["rows"] == results["rows"]
    assert again["summary"] == results["summary"]
    faults.main([*command, "--faults", "lr-jump"])  # the fault-free runs are there already
    assert ran == [("lr-jump", 0), ("lr-jump", 0), ("lr-jump", 1), ("lr-jump", 1)]


def test_the_key_of_a_row_follows_everything_that_decides_it(recipe, monkeypatch):
    def key(fault="none", arm="adamw", seed=0, tuned=faults.TUNED):
        return faults.Cell(
            fault, arm, faults._recipe_of(recipe, faults.ARMS[arm], seed, tuned), faults.ARMS[arm].controller
        ).key

    keys = [key(), key("lr-jump"), key(arm="adamw+clip"), key(arm="lbw-guard"), key(seed=1), key(arm="adamw-tuned")]
    keys.append(key(arm="adamw-tuned", tuned="wsd:1"))
    assert key() == keys[0]
    monkeypatch.setattr(faults, "BURST", 10.0)
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_tuned_arms_get_their_schedule_and_rate(recipe):
    changed = faults._recipe_of(recipe, faults.ARMS["adamw-tuned+clip"], 3, "wsd:1/3")
    assert (changed.schedule.name, changed.optimizer.grad_clip, changed.train.seed) == ("wsd", 1.0, 3)
    assert changed.train.lr_multiplier == pytest.approx(1 / 3)


def test_the_governed_arm_may_roll_back(recipe):
    authority = faults._recipe_of(recipe, faults.ARMS["lbw-guard"], 0, faults.TUNED).authority
    assert (authority.max_rollbacks, authority.lr_scale, authority.momentum_scale) == (3, (1e-3, 100.0), (0.5, 2.0))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--faults", "nan-gradient,fire"], f"faults: 'fire' is unknown; accepted: {', '.join(faults.FAULTS)}"),
        (["--arms", "sgd"], f"arms: 'sgd' is unknown; accepted: {', '.join(faults.ARMS)}"),
        (["--seeds", "0"], "seeds: 0 must be at least 1"),
        (["--recipe", "nothing"], "recipe: unknown name 'nothing'"),
    ],
)
def test_wrong_names_are_refused_before_anything_runs(arguments, complaint, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        faults.main(["--out", str(tmp_path / "out"), *arguments])
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- rows, machine, intervals


def test_a_row_torn_by_a_kill_is_measured_again(tmp_path):
    path = tmp_path / "results.jsonl"
    Rows(path).add("a", {"value": 1})
    path.write_text(path.read_text() + '{"key": "b", "va')
    rows = Rows(path)
    assert rows.get("a") == {"key": "a", "value": 1}
    assert rows.get("b") is None
    rows.add("b", {"value": 2})
    assert Rows(path).get("b") == {"key": "b", "value": 2}


def test_failed_governance_is_no_result():
    refuse_faults({"faults": {}, "suspended": False})
    for summary in ({"faults": {"probe": 3}, "suspended": False}, {"faults": {}, "suspended": True}):
        with pytest.raises(RuntimeError, match="governance failed"):
            refuse_faults(summary)


def test_median_interval_holds_the_median():
    low, high = median_interval([1.0, 1.1, 0.9, 1.2, 1.05])
    assert 0.9 <= low <= 1.05 <= high <= 1.2
    assert median_interval([1.0]) is None


def test_fingerprints_differ_where_settings_do():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})


# ---- overhead

TINY = overhead.Size(16, 32, 1, 2, 64, batch=2, length=8, steps=4, block=2)


def test_overhead_writes_every_loop_and_resumes(tmp_path, monkeypatch):
    results = overhead.benchmark(tmp_path, {"tiny": TINY})
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert [row["loop"] for row in results["rows"]] == ["plain", "trainer"]
    for row in results["rows"]:
        assert (row["steps"], row["blocks"], row["tokens_per_step"]) == (4, 2, 16)
        assert row["ratio"] > 0
        assert math.isfinite(row["governor_own_share"])
        assert row["governor_bytes"] > 0
    monkeypatch.setattr(overhead, "measure", lambda *_: pytest.fail("measured again"))
    assert overhead.benchmark(tmp_path, {"tiny": TINY})["rows"] == results["rows"]


def test_unknown_sizes_and_loops_are_refused(capsys):
    for arguments, accepted in ((["--sizes", "1T"], "0.2M, 5M, 25M, 110M"), (["--loops", "x"], "plain, trainer")):
        with pytest.raises(SystemExit):
            overhead.main(arguments)
        assert f"accepted: {accepted}" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_gpu_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        overhead.main(["--device", "cuda"])
    assert "device: 'cuda' is not there; accepted here: 'cpu'" in capsys.readouterr().err


def test_a_trainer_is_not_timed_on_another_device_than_was_asked_for():
    with pytest.raises(ValueError, match="'cuda' does not go with the loop 'trainer'"):
        overhead.measure(TINY, "trainer", device="cuda")


def test_the_sizes_are_what_they_are_called():
    units = {"M": 1e6, "B": 1e9}
    for name, size in [*overhead.SIZES.items(), *overhead.CUDA_SIZES.items()]:
        embeddings = size.vocabulary * size.hidden
        layer = 4 * size.hidden**2 + 3 * size.hidden * size.intermediate + 2 * size.hidden
        assert embeddings + size.layers * layer == pytest.approx(units[name[-1]] * float(name[:-1]), rel=0.1)


def test_the_bytes_held_are_the_governors_own(make_lm, tokens):
    model = make_lm()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with Governor(optimizer, "lbw-guard") as governor:
        for step in range(3):
            model.zero_grad()
            loss = model(input_ids=tokens(step), labels=tokens(step)).loss
            loss.backward()
            governor.observe(loss)
            optimizer.step()
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        # A reference gradient and the sample before and after a step at most; no copy of weights or moments.
        assert 0 < overhead.held_bytes(governor) < 4 * weights
        assert overhead.state_bytes(optimizer) == pytest.approx(3 * weights, rel=0.05)
        governor.extra = torch.zeros(1_000_000)
        assert overhead.held_bytes(governor) > 4_000_000


# ---- sinks


def test_the_sinks_benchmark_measures_each_of_them():
    pytest.importorskip("prometheus_client")
    pytest.importorskip("tensorboard")
    from lbw_rl.training_runs.benchmarks import sinks

    found = sinks.measure(calls=3)
    assert list(found) == ["exporter, a decision", "event file, a decision", "exporter, a scrape", "bytes"]
    assert all(value > 0 for value in found.values())
