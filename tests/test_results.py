"""results.json and the statistics over it: analytic answers, capping, pairing, and files that survive."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from lbw_rl.training_runs import results as results_module
from lbw_rl.training_runs.intervals import difference_interval, judge, mean_interval
from lbw_rl.training_runs.results import Results, Row, read_results, summarise, write_results
from lbw_rl.training_runs.summary import default_reference, default_subjects, lr_sensitivity


def row(arm: str = "AdamW", loss: float | None = 4.0, multiplier: float = 1.0, seed: int = 0, **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "recipe": "mini",
        "optimizer": "AdamW",
        "controller": "none" if arm.startswith("AdamW") else arm,
        "arm": arm,
        "lr_multiplier": multiplier,
        "base_lr": 3e-3,
        "seed": seed,
        "final_loss": loss,
        "final_ppl": None,
        "initial_loss": 7.0,
        "diverged": False,
        "steps": 300,
        "seconds": 10.0,
        "overhead_seconds": 0.2,
        "skips": 0,
        "rollbacks": 0,
        "steps_to_target": None,
    }
    return Row(**(fields | changes))


def cell_of(summary: dict[str, Any], arm: str, multiplier: float) -> dict[str, Any]:
    return next(c for c in summary["cells"] if (c["arm"], c["lr_multiplier"]) == (arm, multiplier))


def arm_of(summary: dict[str, Any], arm: str) -> dict[str, Any]:
    return next(a for a in summary["arms"] if a["arm"] == arm)


# --- rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_a_loss_that_is_no_number_is_a_divergence_capped_at_the_initial_loss(loss: float | None) -> None:
    made = row(loss=loss)
    assert made.diverged
    assert made.final_loss == 7.0
    assert made.final_ppl == pytest.approx(math.exp(7.0))


def test_a_diverged_run_is_capped_and_a_finished_one_is_not() -> None:
    assert row(loss=40.0, diverged=True, final_ppl=math.inf).final_loss == 7.0
    assert row(loss=6.0, diverged=True).final_loss == 6.0
    finished = row(loss=7.5)
    assert (finished.final_loss, finished.diverged) == (7.5, False)


def test_the_contract_fields_alone_make_a_row() -> None:
    bare = {k: v for k, v in row("pid").model_dump().items() if k not in ("arm", "folder", "interventions")}
    assert (Row(**bare).arm, Row(**bare).folder, Row(**bare).interventions) == ("pid", "", 0)
    assert Row(**(bare | {"controller": "none"})).arm == "AdamW"


@pytest.mark.parametrize("folder", ["../elsewhere", "/etc", "runs/../../x"])
def test_a_folder_outside_the_results_is_refused(folder: str) -> None:
    with pytest.raises(ValidationError, match="must be relative"):
        row(folder=folder)


# --- statistics -----------------------------------------------------------------------------------------


def test_lr_sensitivity_has_its_textbook_value() -> None:
    assert lr_sensitivity([4.0, 5.0, 9.0]) == pytest.approx(2.0)
    assert lr_sensitivity([4.2, 4.2, 4.2]) == 0.0


def test_lr_sensitivity_of_an_arm_caps_and_keeps_what_diverged() -> None:
    rows = [row(loss=4.0), row(loss=5.0, multiplier=0.1), row(loss=math.nan, multiplier=100.0)]
    summary = summarise(rows, "AdamW")
    arm = arm_of(summary, "AdamW")
    assert arm["lr_sensitivity"] == pytest.approx((4 + 5 + 7) / 3 - 4)
    assert (arm["runs"], arm["diverged"], arm["divergence_rate"]) == (3, 1, pytest.approx(1 / 3))
    assert (arm["worst_multiplier"], arm["worst_ppl"]) == (100.0, pytest.approx(math.exp(7.0)))
    assert cell_of(summary, "AdamW", 100.0)["diverged"] == 1


def test_a_finished_run_worse_than_untrained_is_capped_in_the_sensitivity_only() -> None:
    summary = summarise([row(loss=4.0), row(loss=9.0, multiplier=10.0)], "AdamW")
    assert arm_of(summary, "AdamW")["lr_sensitivity"] == pytest.approx((4 + 7) / 2 - 4)
    assert cell_of(summary, "AdamW", 10.0)["loss_mean"] == 9.0


def test_cells_hold_medians_means_and_ranges() -> None:
    losses = [4.0, 4.1, 4.4]
    summary = summarise([row(loss=v, seed=s) for s, v in enumerate(losses)], "AdamW")
    cell = cell_of(summary, "AdamW", 1.0)
    assert cell["n"] == 3
    assert (cell["loss_median"], cell["loss_mean"]) == (4.1, pytest.approx(4.1667, abs=1e-4))
    assert cell["loss_range"] == [4.0, 4.4]
    assert cell["ppl_mean"] == pytest.approx(np.exp(losses).mean())
    low, high = cell["loss_interval"]
    assert 4.0 <= low < cell["loss_mean"] < high <= 4.4
    assert cell["interval_note"] is None


@pytest.mark.parametrize(("losses", "note"), [([4.0], "one seed"), ([4.0, 4.0, 4.0], "all seeds equal")])
def test_a_cell_without_spread_says_so(losses: list[float], note: str) -> None:
    cell = cell_of(summarise([row(loss=v, seed=s) for s, v in enumerate(losses)], "AdamW"), "AdamW", 1.0)
    assert (cell["loss_interval"], cell["ppl_interval"], cell["interval_note"]) == (None, None, note)


def test_ratios_pair_seeds_with_the_reference_at_its_own_best_multiplier() -> None:
    reference = {0: 4.0, 1: 5.0, 2: 6.0}
    rows = [row(loss=v, seed=s) for s, v in reference.items()]
    rows += [row(loss=v + 0.5, seed=s, multiplier=10.0) for s, v in reference.items()]
    drops = {0: 0.1, 1: 0.2, 2: 0.6, 9: 3.0}  # seed 9 has no partner
    rows += [row("ppo", reference.get(s, 6.5) - d, 10.0, s) for s, d in reversed(drops.items())]
    summary = summarise(rows, "AdamW")
    assert summary["reference"]["mini"]["lr_multiplier"] == 1.0
    cell = cell_of(summary, "ppo", 10.0)
    assert cell["pairs"] == 3
    assert cell["ratio_to_tuned_median"] == pytest.approx(math.exp(-0.2))
    assert cell["ratio_to_tuned"] == pytest.approx(math.exp(-0.3))
    low, high = cell["ratio_to_tuned_interval"]
    assert math.exp(-0.6) <= low < math.exp(-0.3) < high <= math.exp(-0.1)


def test_recipes_are_kept_apart() -> None:
    rows = [row(loss=4.0), row("ppo", 3.9), row(loss=5.0, recipe="wide"), row("ppo", 5.2, recipe="wide")]
    summary = summarise(rows, "AdamW")
    ratios = {c["recipe"]: c["same_lr"]["ratio"] for c in summary["comparisons"]}
    assert ratios == {"mini": pytest.approx(math.exp(-0.1)), "wide": pytest.approx(math.exp(0.2))}


def test_comparisons_average_over_the_grid_and_judge_over_seeds() -> None:
    rows = []
    for seed in range(4):
        noise = 0.01 * seed
        rows += [row(loss=4.0, seed=seed), row(loss=6.0, seed=seed, multiplier=10.0)]
        rows += [row("ppo", 4.1 + noise, seed=seed), row("ppo", 4.3 + noise, 10.0, seed)]
        rows += [row("pid", 4.1 + 0.02 * (-1) ** seed, seed=seed), row("pid", 4.3, 10.0, seed)]
    by_arm = {c["against"]: c for c in summarise(rows, "AdamW", ["ppo"])["comparisons"]}
    same, tuned = by_arm["AdamW"]["same_lr"], by_arm["AdamW"]["each_tuned"]
    assert same["ratio"] == pytest.approx(math.exp((0.1 - 1.7) / 2 + 0.015))
    assert (same["n"], same["verdict"]) == (4, "better")
    assert (tuned["ratio"], tuned["verdict"]) == (pytest.approx(math.exp(0.115)), "worse")
    assert by_arm["pid"]["same_lr"]["verdict"] == "unresolved"


def test_the_steps_to_a_target_that_most_seeds_miss_are_unknown() -> None:
    reached = summarise([row(seed=s, steps_to_target=v) for s, v in enumerate([100, 120, None])], "AdamW")
    missed = summarise([row(seed=s, steps_to_target=v) for s, v in enumerate([100, None, None])], "AdamW")
    assert (reached["cells"][0]["steps_to_target"], reached["cells"][0]["reached_target"]) == (120, 2)
    assert (missed["cells"][0]["steps_to_target"], missed["cells"][0]["reached_target"]) == (None, 1)


def test_an_incomplete_grid_is_marked() -> None:
    summary = summarise([row(), row(multiplier=10.0), row("pid")], "AdamW")
    assert [a["grid_complete"] for a in summary["arms"]] == [True, False]


def test_reference_and_subjects_have_sensible_defaults() -> None:
    rows = [row("lbw-guard"), row("constant"), row("StableAdamW", controller="none"), row()]
    assert default_reference(rows) == "AdamW"
    assert default_reference(rows[:3]) == "constant"
    assert default_subjects(rows, "AdamW") == ["lbw-guard"]
    learned = [row("ppo"), row("my policy", controller="out/policy"), row("ppo untrained", controller="out/untrained")]
    assert default_subjects(rows + learned, "AdamW") == ["ppo", "my policy"]
    assert default_subjects([*rows, row("replay", controller="open-loop")], "AdamW") == ["lbw-guard"]


def test_an_unknown_arm_is_refused_and_no_rows_are_no_error() -> None:
    with pytest.raises(ValueError, match="reference_arm: 'Lion' is not an arm of these results; arms: AdamW"):
        summarise([row()], "Lion")
    with pytest.raises(ValueError, match="subjects: 'Lion'"):
        summarise([row()], "AdamW", ["Lion"])
    assert summarise([], "AdamW")["cells"] == []


# --- intervals ------------------------------------------------------------------------------------------


def test_the_bootstrap_interval_is_sane() -> None:
    values = np.random.default_rng(1).normal(4.0, 0.1, 60).tolist()
    interval = mean_interval(values)
    assert interval is not None
    low, high = interval
    expected = 1.96 * np.std(values) / math.sqrt(60)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.15)
    assert low < np.mean(values) < high
    assert interval == mean_interval(values)


@pytest.mark.parametrize("values", [[], [4.0], [4.0, 4.0], [1e3, 1e3 + 1e-10]])
def test_there_is_no_interval_without_spread(values: list[float]) -> None:
    assert mean_interval(values) is None
    assert difference_interval(values) is None


def test_the_interval_of_differences_is_students() -> None:
    interval = difference_interval([-1.0, 0.0, 1.0])
    assert interval == (pytest.approx(-4.3027 / math.sqrt(3), abs=1e-4), pytest.approx(4.3027 / math.sqrt(3), abs=1e-4))


def test_a_verdict_needs_an_interval() -> None:
    assert judge([])["ratio"] is None
    assert judge([-0.5])["verdict"] == "no interval"
    assert judge([-0.5, -0.51, -0.49])["verdict"] == "better"
    assert judge([0.5, 0.51, 0.49])["verdict"] == "worse"
    assert judge([-0.5, 0.5])["verdict"] == "unresolved"


# --- files ----------------------------------------------------------------------------------------------


def test_json_and_parquet_round_trip(tmp_path: Path) -> None:
    rows = [row(seed=s, steps_to_target=t, folder=f"runs/{s}") for s, t in enumerate([120, None])]
    summary = {**summarise(rows, "AdamW"), "provenance": {"machine": "two cores", "bad": math.nan}}
    write_results(tmp_path / "new", Results(rows=rows, summary=summary))
    again = read_results(tmp_path / "new" / "results.json")
    assert again.rows == rows
    assert again.summary["cells"][0]["n"] == 2
    assert again.summary["provenance"] == {"machine": "two cores", "bad": None}
    assert read_results(tmp_path / "new" / "results.parquet").rows == rows
    table = pq.read_table(tmp_path / "new" / "results.parquet")
    assert [Row(**record) for record in table.to_pylist()] == rows
    assert table.schema.field("steps_to_target").type == "int64"
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["results.json", "results.parquet"]
    raw = json.loads((tmp_path / "new" / "results.json").read_text(), parse_constant=pytest.fail)
    assert raw["schema"] == 1


def test_a_parquet_file_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(ValueError, match=r"rows\.parquet is not Parquet"):
        read_results(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"recipe": ["mini"], "seed": [0]}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.0\.optimizer: Field required"):
        read_results(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"cannot read .*missing\.parquet"):
        read_results(tmp_path / "missing.parquet")


def test_parquet_of_no_rows_and_of_columns_without_a_value(tmp_path: Path) -> None:
    write_results(tmp_path, Results(rows=[]))
    assert pq.read_table(tmp_path / "results.parquet").num_rows == 0
    assert read_results(tmp_path).rows == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(tmp_path, Results(rows=[row()]))

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(results_module.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_results(tmp_path, Results(rows=[row(), row(seed=1)]))
    assert len(read_results(tmp_path).rows) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "results.parquet"]


def broken(**changes: Any) -> str:
    return json.dumps({"schema": 1, "rows": [row().model_dump() | changes]})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[]", "top level"),
        ('{"schema": 2, "rows": []}', "schema: Input should be 1, got 2"),
        ('{"schema": 1}', "rows: Field required"),
        (broken(lr_multiplier=0), "rows.0.lr_multiplier: Input should be greater than 0, got 0"),
        (broken(final_loss="low"), "rows.0.final_loss: .* got 'low'"),
        (broken(initial_loss=None), "rows.0.initial_loss"),
        (broken(folder="../x"), "rows.0.folder"),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_field(tmp_path: Path, text: str | None, reason: str) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=reason) as caught:
        read_results(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
