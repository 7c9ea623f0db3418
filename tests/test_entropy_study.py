"""The entropy study: its regimes are what they say, its figure is the AUC, and it goes on where it was stopped."""

import json

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")
pytest.importorskip("scipy", reason="needs the extra lbw-rl[report]")

from lbw_rl.controllers.entropic import EntroPIC
from lbw_rl.controllers.pid import PID
from lbw_rl.entropy import ESTIMATORS
from lbw_rl.envs.recipe import load_recipe, override
from lbw_rl.envs.task import TrainingTask
from lbw_rl.setpoint import ratio_level
from lbw_rl.training_runs.benchmarks import entropy_study as study
from lbw_rl.training_runs.benchmarks import step_response

STEPS = 70


@pytest.fixture
def settings(tiny):
    return [*(s for s in tiny if not s.startswith(("train.steps", "train.threads"))), f"train.steps={STEPS}"]


def gradients_of(task, steps):
    """Step → (largest gradient element of each tensor, tokens that were read)."""
    read = []
    task.model.register_forward_pre_hook(lambda m, a, k: read.append(k["input_ids"].clone()) or None, with_kwargs=True)
    seen = []
    for _ in range(steps):
        task.backward()
        seen.append([float(p.grad.abs().max()) for p in task.model.parameters() if p.ndim >= 2])
        task.advance()
    return seen, read


def test_bursts_are_one_tensor_of_five_steps_in_fifty_and_the_fifth_is_nan(settings):
    task = TrainingTask(override(load_recipe("mini-qwen2"), [*settings, "optimizer.lr=1e-12"]))
    study.bursts(task)
    seen, _ = gradients_of(task, 50)
    usual = np.median(np.array(seen[:40]), axis=0)
    for step, sizes in enumerate(seen):
        ratios = np.array(sizes) / usual
        if 45 <= step < 49:
            assert study.in_burst(step)
            assert sorted(ratios > 50)[-2:] == [False, True]
        elif step == 49:
            assert np.isnan(ratios).sum() == 1
        else:
            assert not study.in_burst(step)
            assert (ratios < 50).all()


def test_the_overfitting_run_reads_four_batches_again_and_again(settings):
    task = TrainingTask(override(load_recipe("mini-qwen2"), settings))
    study.memorises(task)
    _, read = gradients_of(task, 12)
    assert all((read[i] == read[i % 4]).all() for i in range(12))
    assert not (read[0] == read[1]).all()


def test_auc_is_the_probability_of_the_larger_one():
    low, high = np.arange(5.0), np.arange(5.0) + 10
    assert (study.auc(high, low), study.auc(low, high), study.auc(low, low)) == (1.0, 0.0, 0.5)


def test_only_steps_within_bursts_are_judged_and_only_smoothed_ones_elsewhere():
    values = [float(i) for i in range(200)]
    burst = study.judged({"regime": "nan-burst", "entropy": {"element": [*values[:49], None, *values[50:]]}}, "element")
    assert burst.tolist() == [*range(45, 49), *range(95, 100), *range(145, 150), *range(195, 200)]
    healthy = study.judged({"regime": "healthy", "entropy": {"element": values}}, "element")
    assert (healthy[0], healthy[-1], healthy.size) == (study.SKIPPED + 1, 198, 148)


def test_a_tiny_study_is_complete_draws_and_resumes(settings, tmp_path, in_process, monkeypatch):
    results = study.study(tmp_path, cases=["mini-qwen2"], seeds=1, settings=settings)
    assert [row["regime"] for row in results["rows"]] == list(study.REGIMES)
    assert json.loads((tmp_path / "results.json").read_text())["summary"] == json.loads(json.dumps(results["summary"]))
    assert [e["estimator"] for e in results["summary"]] == list(ESTIMATORS)
    for entry in results["summary"]:
        assert all(0.0 <= area <= 1.0 for area in entry["auc"].values())
        assert 0.0 <= entry["separation"] <= 1.0
    assert all(np.isfinite(row["final_loss"]) for row in results["rows"])  # NaN was skipped, in the bursts too
    monkeypatch.setattr(study, "run_cell", lambda *_: pytest.fail("run again"))
    again = study.study(tmp_path, cases=["mini-qwen2"], seeds=1, settings=settings)
    assert again["rows"] == results["rows"]
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    from lbw_rl.training_runs.benchmarks.entropy_figures import draw

    assert all(path.stat().st_size > 10_000 for path in draw(results, tmp_path / "plots"))


def test_wrong_cases_and_counts_are_refused(tmp_path, capsys):
    for arguments, accepted in (
        (["--cases", "gpt"], "accepted: mini-qwen2, mini-llama"),
        (["--seeds", "0"], "seeds: 0"),
    ):
        with pytest.raises(SystemExit):
            study.main([*arguments, "--out", str(tmp_path)])
        assert accepted in capsys.readouterr().err


def test_the_cost_names_every_estimator():
    cost = study.cost(calls=3)
    assert list(cost) == list(ESTIMATORS)
    assert all(microseconds > 0 for microseconds in cost.values())


# ---- step responses


def test_a_dead_beat_loop_answers_a_jump_of_the_plant_within_one_decision():
    setpoint = ratio_level(step_response.STEPS)
    answers = step_response.respond(PID(setpoint=setpoint, ki=1.0, kp=0.0), step_response.gain_step, 40)
    assert answers[19] == pytest.approx(1.0, rel=1e-3)
    assert answers[20] == pytest.approx(10.0, rel=1e-2)
    assert answers[21:] == pytest.approx([1.0] * 19, rel=1e-2)


def test_the_entropy_loop_cuts_while_energy_concentrates_and_comes_back():
    answers = step_response.respond(EntroPIC(), step_response.entropy_step, 400)
    assert answers[19] == pytest.approx(1.0, rel=1e-3)
    assert min(answers[20:80]) < 0.5
    assert answers[-1] == pytest.approx(1.0, rel=1e-2)
