"""The stress suite's figures of merit, against answers worked out by hand."""

import json
import math

import numpy as np
import pytest

from lbw_rl.training_runs.results import Row

pytest.importorskip("scipy", reason="needs the extra lbw-rl[report]")

from lbw_rl.training_runs.intervals import seed_interval
from lbw_rl.training_runs.stress.clock import held_out_curve, step_seconds, steps_to
from lbw_rl.training_runs.stress.conduct import interventions, mean_scale
from lbw_rl.training_runs.stress.measures import measure, sensitivity, worst_ratio
from lbw_rl.training_runs.stress.source import source_table
from lbw_rl.training_runs.stress.suite import GUARD, MINI, TUNED
from lbw_rl.training_runs.stress.targets import judge_targets

# ---- time to a loss

CURVE = [(0.0, 7.0), (10.0, 5.0), (20.0, 6.0), (30.0, 4.0)]


@pytest.mark.parametrize(
    ("target", "steps"),
    [(7.0, 0.0), (6.0, 5.0), (5.0, 10.0), (4.5, 27.5), (4.0, 30.0), (3.9, math.inf)],
)
def test_the_first_time_a_curve_is_at_a_loss(target, steps):
    assert steps_to(CURVE, target) == steps


def test_a_curve_is_read_off_the_metrics_with_the_untrained_model_before_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    evals = [None, 6.0, None, None, 5.0]  # the one in the middle: not due, or not finite
    path.write_text(
        "".join(json.dumps({"step": i, "eval_loss": e, "seconds": 0.5 * (i + 1)}) + "\n" for i, e in enumerate(evals))
        + '{"step": 5, "eva'
    )
    assert held_out_curve(path, 7.0) == [(0.0, 7.0), (2.0, 6.0), (5.0, 5.0)]
    assert step_seconds(path) == 0.5


def test_one_stall_is_no_part_of_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    clock = [0.1, 0.2, 60.2, 60.3, 60.4]
    path.write_text("".join(json.dumps({"step": i, "seconds": s}) + "\n" for i, s in enumerate(clock)))
    assert step_seconds(path) == pytest.approx(0.1)
    assert math.isnan(step_seconds(tmp_path / "none.jsonl"))


# ---- the axis


def test_sensitivity_is_the_mean_excess_over_the_best_multiplier():
    value, interval = sensitivity(np.array([[5.0, 4.0, 6.0]]))
    assert value == pytest.approx(1.0)
    assert interval is None  # one seed
    value, _ = sensitivity(np.array([[5.0, 4.0, 6.0], [5.2, 4.4, 6.0]]))
    assert value == pytest.approx((5.1 + 4.2 + 6.0) / 3 - 4.2)


def test_intervals_draw_whole_seeds():
    """What all multipliers of a seed share cancels; drawn one by one it would not."""
    axis = np.array([5.0, 4.0, 6.0])
    shared = axis + np.array([[0.0], [0.5], [1.0]])
    assert sensitivity(shared)[1] is None  # equal in every seed: nothing to resample
    nearly = shared + np.array([[0.0, 0.0, 0.03], [0.0, 0.0, 0.06], [0.0, 0.0, 0.09]])
    value, (low, high) = sensitivity(nearly)
    assert value == pytest.approx(1.02)
    assert 1.01 - 1e-9 <= low < value < high <= 1.03 + 1e-9


def test_an_interval_of_a_mean_is_the_one_of_scipy():
    from lbw_rl.training_runs.intervals import mean_interval

    values = np.random.default_rng(1).normal(size=7)
    assert seed_interval(values[:, None], lambda means: means[..., 0]) == pytest.approx(mean_interval(values))


def test_the_worst_multiplier_is_that_of_the_mean_over_paired_seeds():
    losses = np.array([[4.1, 4.0], [4.4, 4.6], [3.05, 3.1]])
    ratio, at, interval = worst_ratio(losses, np.array([4.0, 4.4, 3.0]))
    assert (ratio, at) == (pytest.approx(math.exp(0.1)), 1)  # 0.05 on average at the first, 0.1 at the second
    assert interval is not None
    assert interval[0] < ratio < interval[1]


# ---- what a governor did


def ledger(path, decisions):
    lines = [{"type": "header", "schema": 1}]
    for step, (scale, directive, regime) in enumerate(decisions):
        executed = {"lr_scale": scale, "momentum_scale": 1.0, "directive": directive}
        lines.append({"type": "decision", "step": step, "executed": executed, "regime": regime})
    lines.insert(2, {"type": "mode", "step": 1})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_alarms_skips_and_rollbacks_are_beyond_modulation_and_tracking_is_not(tmp_path):
    path = ledger(
        tmp_path / "ledger.jsonl",
        [
            (1.0, "proceed", "calibrating"),
            (30.0, "proceed", "raising"),
            (0.1, "proceed", "holding-back"),
            (0.1, "proceed", "annealing"),
            (0.1, "proceed", "overshoot"),
            (0.1, "skip", "bad-batch"),
            (0.1, "rollback", "diverged"),
            (0.1, "skip", "a name of its own"),
        ],
    )
    assert interventions(path) == (4, 8)


def test_the_mean_scale_is_geometric_and_passes_over_withheld_updates(tmp_path):
    first = ledger(tmp_path / "a.jsonl", [(1.0, "proceed", "x"), (4.0, "proceed", "x"), (9.0, "skip", "x")])
    second = ledger(tmp_path / "b.jsonl", [(1.0, "skip", "x"), (9.0, "proceed", "x"), (1 / 3, "proceed", "x")])
    assert mean_scale([first, second]) == [1.0, 6.0, pytest.approx(math.sqrt(4 / 3), rel=1e-5)]
    short = ledger(tmp_path / "c.jsonl", [(1.0, "proceed", "x")])
    with pytest.raises(ValueError, match=r"^replay: runs of 3, 1 decisions; accepted: of equal length"):
        mean_scale([first, short])


# ---- a family


def write_run(folder, evals, step_time, decisions=()):
    folder.mkdir(parents=True)
    recipe = {"train": {"batch_size": 2, "accumulation": 3}, "data": {"sequence_length": 5}}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    lines = [{"step": i, "eval_loss": None, "seconds": step_time * (i + 1)} for i in range(40)]
    for step, loss in evals.items():
        lines[step - 1]["eval_loss"] = loss
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if decisions:
        ledger(folder / "ledger.jsonl", decisions)


@pytest.fixture
def family(tmp_path):
    """Two seeds, three multipliers, the baseline and a governor; AdamW ends at 4.0 + 0.2 · seed, best at 3×."""
    rows = []

    def add(arm, controller, multiplier, seed, evals, step_time, decisions=(), **more):
        folder = f"runs/{controller}-{multiplier:g}-{seed}"
        write_run(tmp_path / folder, evals, step_time, decisions)
        values = {
            "recipe": "f",
            "optimizer": "adamw",
            "controller": controller,
            "arm": arm,
            "lr_multiplier": multiplier,
            "base_lr": 1e-3,
            "seed": seed,
            "final_loss": evals[40],
            "final_ppl": None,
            "initial_loss": 7.0,
            "diverged": False,
            "steps": 40,
            "seconds": 40 * step_time,
            "overhead_seconds": 0.0,
            "skips": 0,
            "rollbacks": 0,
            "folder": folder,
        }
        rows.append(Row(**{**values, **more}))

    calm = [(1.0, "proceed", "steady")] * 39
    for seed in (0, 1):
        off = 0.2 * seed
        add(TUNED, "constant", 1.0, seed, {20: 5.0, 40: 4.1 + off}, 0.1)
        add(TUNED, "constant", 3.0, seed, {20: 5.0, 40: 4.0 + off}, 0.1)
        add(TUNED, "constant", 100.0, seed, {20: 9.0, 40: 9.5}, 0.1, diverged=True)
        # The governor is at 4.0 + off half-way between steps 20 and 40, at twice the time a step.
        alarm = [(1.0, "skip", "bad-batch")] if seed else [(1.0, "proceed", "steady")]
        first = {20: 4.1 + off, 40: 3.9 + off}
        add(GUARD, "lbw-guard", 1.0, seed, first, 0.2, calm + alarm, overhead_seconds=1.0, skips=seed)
        add(GUARD, "lbw-guard", 3.0, seed, {40: 4.0 + off}, 0.2, calm)
        add(GUARD, "lbw-guard", 100.0, seed, {40: 4.3 + off}, 0.2, calm)
    return rows


def test_a_family_is_measured_against_the_baseline_at_its_best(family, tmp_path):
    found = measure(family, tmp_path, TUNED)
    assert found["reference"] == {
        "arm": TUNED,
        "multiplier": 3.0,
        "loss": pytest.approx(4.1),
        "ppl": pytest.approx(math.exp(4.1)),
    }
    adamw, guard = found["arms"]
    assert (adamw["arm"], guard["arm"]) == (TUNED, GUARD)
    assert adamw["losses"] == pytest.approx([4.2, 4.1, 7.0])  # a diverged run is capped at the untrained model's loss
    assert (adamw["diverged"], adamw["runs"], adamw["divergence_rate"]) == (2, 6, pytest.approx(1 / 3))
    assert adamw["lr_sensitivity"] == pytest.approx((0.1 + 0.0 + 2.9) / 3)
    assert adamw["worst_ratio"] == pytest.approx(math.exp(2.9))
    assert adamw["worst_multiplier"] == 100.0
    assert adamw["ratio"] == pytest.approx(math.exp(0.1))
    assert (adamw["reached"], adamw["steps_ratio"], adamw["seconds_ratio"]) == (0, None, None)  # not at 1×
    assert adamw["beyond_modulation_share"] is None

    assert guard["lr_sensitivity"] == pytest.approx((0.0 + 0.1 + 0.4) / 3)
    assert guard["worst_ratio"] == pytest.approx(math.exp(0.3))
    assert guard["ratio"] == pytest.approx(math.exp(-0.1))
    assert guard["best"]["ratio"] == pytest.approx(math.exp(-0.1))
    assert guard["best_multiplier"] == 1.0
    assert guard["reached"] == 2
    assert guard["steps_to_target"] == pytest.approx(30.0)
    assert guard["steps_ratio"] == pytest.approx(0.75)
    assert guard["seconds_ratio"] == pytest.approx(1.5)
    assert guard["tokens_per_second"] == pytest.approx(2 * 3 * 5 / 0.2)
    assert guard["overhead"] == pytest.approx(1 / 8)
    assert (guard["beyond_modulation"], guard["beyond_modulation_share"]) == (1, pytest.approx(1 / 80))
    assert (guard["base_skips"], guard["base_rollbacks"]) == (1, 0)


def test_the_source_and_ours_stand_in_one_row(family, tmp_path):
    measured = {"name": "mini-qwen2-lora", **measure(family, tmp_path, TUNED)}
    rows = {(row["what"], row["family"]): row for row in source_table(MINI, [measured])}
    reference = rows["Reference perplexity", "mini-qwen2-lora"]
    assert (reference["adamw"], reference["guard"]) == ("13.21", "10.74")
    assert reference["ours_adamw"] == pytest.approx(math.exp(4.2))
    assert reference["ours_guard"] == pytest.approx(math.exp(4.0))
    near = rows["LR 1e-3", "mini-qwen2-lora"]  # 10/3 of its reference: the grid's 3
    assert (near["multiplier"], near["ours_adamw"]) == (3.0, pytest.approx(math.exp(4.1)))
    far = rows["LR 3e-3", "mini-qwen2-lora"]  # this grid has no 10
    assert (far["adamw"], far["multiplier"], far["ours_adamw"], far["ours_guard"]) == ("1885.24", None, None, None)
    time = rows["End-to-end time", "mini-qwen2-lora"]
    assert (time["ours_adamw"], time["ours_guard"]) == (pytest.approx(4.0), pytest.approx(8.0))
    size = rows["Model size: 3B", "mini-qwen2-50k"]
    assert (size["adamw"], size["guard"], size["ours_adamw"]) == ("", "", None)
    assert ("TinyLlama, all parameters trained", "mini-llama-full") in rows


# ---- targets


def arm(name, controller, **more):
    usual = {
        "lr_sensitivity": 0.02,
        "worst_ratio": 1.02,
        "ratio": 0.9,
        "base_rollbacks": 0,
        "beyond_modulation_share": 0.0,
        "steps_ratio": 0.7,
        "seconds_ratio": 0.8,
        "best": {"ratio": 1.0},
        "multipliers": [1.0, 30.0],
    }
    return {"arm": name, "controller": controller, **usual, **more}


def families(*guards):
    rival = arm("rival", "constant", lr_sensitivity=0.5)
    lame = arm("never learns", "constant", lr_sensitivity=0.001, best={"ratio": 9.0})
    return [
        {"name": f"f{i}", "chosen_on": i == 0, "arms": [arm(GUARD, "lbw-guard", **guard), rival, lame]}
        for i, guard in enumerate(guards)
    ]


def judged(*guards):
    return {target["id"]: target for target in judge_targets(families(*guards), GUARD)}


def test_every_target_is_met_by_a_governor_that_meets_it():
    found = judged({}, {})
    assert {target["met"] for target in found.values()} == {True}
    assert found["sensitivity-rival"]["measured"] == pytest.approx(0.04)  # of the rival that learns
    assert found["tuned-mean"]["measured"] == pytest.approx(0.9)


def test_the_worst_family_decides_and_held_out_ones_are_told_apart():
    found = judged({"lr_sensitivity": 0.05, "ratio": 1.2}, {"ratio": 0.8})
    assert (found["sensitivity"]["met"], found["sensitivity"]["measured"]) == (False, 0.05)
    assert found["sensitivity"]["held_out"] == 0.02
    assert found["sensitivity"]["families"] == {"f0": 0.05, "f1": 0.02}
    assert (found["tuned-each"]["measured"], found["tuned-each"]["met"]) == (1.2, False)
    assert found["tuned-mean"]["measured"] == pytest.approx(math.sqrt(1.2 * 0.8))
    assert found["tuned-mean"]["held_out"] == pytest.approx(0.8)


def test_limits_count_as_they_are_written():
    found = judged({"lr_sensitivity": 0.03, "beyond_modulation_share": 0.01, "base_rollbacks": 1})
    assert found["sensitivity"]["met"] is True  # at most
    assert found["interventions"]["met"] is False  # under
    assert found["rollbacks"]["met"] is False


def test_a_loss_that_is_never_reached_meets_no_target_and_what_was_not_run_is_not_judged():
    found = judged({"steps_ratio": None, "seconds_ratio": None}, {})
    assert (found["steps"]["met"], found["steps"]["measured"], found["steps"]["never"]) == (False, None, ["f0"])
    assert found["steps"]["held_out"] == 0.7
    nothing = judge_targets([{"name": "f", "chosen_on": False, "arms": [arm("rival", "constant")]}], GUARD)
    assert {(target["met"], target["measured"]) for target in nothing} == {(None, None)}
