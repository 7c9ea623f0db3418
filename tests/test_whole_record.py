"""Records that lack lines, as a full disk leaves them: never a figure that is wrong without a word."""

import json
import math

import pytest
from full_disk import disk_of

from lbw_rl.envs.recipe import load_recipe, override
from lbw_rl.training_runs.compare import Arm, compare
from lbw_rl.training_runs.report import build_report
from lbw_rl.training_runs.results import read_results
from lbw_rl.training_runs.stress.measures import measure
from lbw_rl.training_runs.stress.report import build_stress_report
from lbw_rl.training_runs.stress.suite import GUARD, REPLAY, TUNED
from lbw_rl.training_runs.stress.targets import judge_targets
from lbw_rl.training_runs.whole_record import in_words, lacking_lines

pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")
pytest.importorskip("scipy", reason="needs the extra lbw-rl[report]")
pytest.importorskip("plotly", reason="needs the extra lbw-rl[report]")

ARMS = [Arm(TUNED, "constant"), Arm(GUARD, "lbw-guard")]


@pytest.fixture
def grid(tiny, tmp_path, in_process):
    """Two arms at two multipliers and three seeds, all records whole."""
    compare(override(load_recipe("mini-qwen2"), [*tiny, "train.steps=12"]), ARMS, [1.0, 3.0], 3, tmp_path)
    return tmp_path


def cut(path, lines):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))


def finite(value):
    """No NaN and no infinity at any depth: what JSON does not know."""
    if isinstance(value, dict | list):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def measured(folder):
    found = measure(read_results(folder).rows, folder, TUNED)
    assert finite(found)
    return found, {arm["arm"]: arm for arm in found["arms"]}


def rows_of(folder, arm, multiplier=1.0):
    return [r for r in read_results(folder).rows if (r.arm, r.lr_multiplier) == (arm, multiplier)]


def test_whole_records_lack_nothing(grid):
    assert lacking_lines(grid, read_results(grid).rows) == {}
    assert measured(grid)[0]["lacking"] == {}
    assert read_results(grid).summary["lacking"] == {}


@pytest.mark.parametrize(
    ("spoil", "there"),
    [
        (lambda path: cut(path, 5), 5),
        (lambda path: path.write_text(""), 0),
        (lambda path: path.unlink(), 0),
        (lambda path: path.write_bytes(b"\0" * 4096 + b"\xff\n"), 0),  # as a power loss leaves it
    ],
)
def test_metrics_that_lack_lines_leave_their_seed_out_of_times(grid, spoil, there):
    _, before = measured(grid)
    row = rows_of(grid, GUARD)[1]
    spoil(grid / row.folder / "metrics.jsonl")
    found, arms = measured(grid)
    assert found["lacking"] == {row.folder: {"metrics.jsonl": f"{there} of 12 lines"}}
    assert arms[GUARD]["timed"] == 2
    assert before[GUARD]["timed"] == 3
    kept = {"ratio", "worst_ratio", "lr_sensitivity", "beyond_modulation", "beyond_modulation_share", "losses"}
    assert {k: arms[GUARD][k] for k in kept} == {k: before[GUARD][k] for k in kept}
    assert arms[TUNED] == before[TUNED]


def test_a_baseline_without_metrics_gives_no_times_and_no_false_never(grid):
    """`never` would say that the governor does not get there; the report says that nothing is known."""
    for multiplier in (1.0, 3.0):
        for row in rows_of(grid, TUNED, multiplier):
            (grid / row.folder / "metrics.jsonl").write_text("")
    found, arms = measured(grid)
    assert len(found["lacking"]) == 6
    assert arms[GUARD]["timed"] == 0
    assert not {"steps_ratio", "seconds_ratio", "steps_to_target"} & (set(arms[GUARD]) | set(arms[TUNED]))
    assert arms[TUNED]["tokens_per_second"] is None
    assert arms[GUARD]["tokens_per_second"] > 0
    family = {"name": "f", "chosen_on": False, **found}
    judged = {t["id"]: t for t in judge_targets([family], GUARD)}
    for target in ("steps", "seconds"):
        assert (judged[target]["met"], judged[target]["families"], judged[target]["never"]) == (None, {}, [])


@pytest.mark.parametrize("lines", [0, 6, None])
def test_a_ledger_that_lacks_decisions_is_not_counted_as_calm(grid, lines):
    row = rows_of(grid, GUARD)[0]
    path = grid / row.folder / "ledger.jsonl"
    if lines is None:  # torn in the middle
        path.write_bytes(path.read_bytes()[:-2000] + b"\n" + path.read_bytes()[-1000:])
    else:
        cut(path, lines)
    found, arms = measured(grid)
    (lacking,) = found["lacking"].values()
    assert list(found["lacking"]) == [row.folder]
    assert lacking["ledger.jsonl"].endswith(f"{max(0, (lines or 1) - 1)} of 12 decisions")
    total = (
        arms[GUARD]["beyond_modulation"] / arms[GUARD]["beyond_modulation_share"]
        if arms[GUARD]["beyond_modulation"]
        else 24
    )
    assert total == 24


def test_no_ledger_at_all_is_no_share_of_decisions(grid):
    for row in rows_of(grid, GUARD):
        (grid / row.folder / "ledger.jsonl").unlink()
    assert measured(grid)[1][GUARD]["beyond_modulation_share"] is None


def test_a_grid_on_a_full_disk_ends_and_names_its_incomplete_runs(tiny, tmp_path, in_process, caplog):
    recipe = override(load_recipe("mini-qwen2"), [*tiny, "train.steps=40", "train.eval_every=10"])
    with disk_of(20_000):  # of a ledger a few decisions, of everything else all
        results = compare(recipe, ARMS, [1.0], 2, tmp_path)
    lacking = results.summary["lacking"]
    assert set(lacking) == {r.folder for r in rows_of(tmp_path, GUARD)}
    assert {name for files in lacking.values() for name in files} == {"ledger.jsonl"}
    (told,) = [m for m in caplog.messages if "incomplete records" in m]
    assert told.startswith("2 runs left incomplete records, as a full disk makes them")
    assert told.endswith(in_words(lacking))
    page = build_report(tmp_path).read_text(encoding="utf-8")
    assert "Incomplete records of 2 runs, as a full disk leaves them" in page
    assert in_words(lacking) in page
    results = compare(recipe, ARMS, [1.0], 2, tmp_path, resume=True)  # finished runs are not run again
    assert results.summary["lacking"] == lacking


def test_a_suite_whose_governor_left_no_whole_ledger_ends_without_its_replay(lbw, small, tmp_path, in_process, caplog):
    """What a full disk leaves after stage 2; before, the suite died in stage 3."""
    out = tmp_path / "out"
    arguments = ["stress", "--families", "mini-qwen2", *small, "--out", out, "--json", "--resume"]
    findings = lbw(*arguments).json()
    assert REPLAY in {arm["arm"] for arm in findings["families"][0]["arms"]}
    (governed,) = [r for r in read_results(out).rows if (r.arm, r.lr_multiplier) == (GUARD, 1.0)]
    cut(out / governed.folder / "ledger.jsonl", 4)
    findings = lbw(*arguments).json()
    (family,) = findings["families"]
    assert REPLAY not in {arm["arm"] for arm in family["arms"]}
    assert family["lacking"] == {governed.folder: {"ledger.jsonl": "3 of 6 decisions"}}
    assert caplog.messages[0] == f"mini-qwen2: no run of {GUARD} left a whole ledger, so none is replayed"
    assert "1 run left incomplete records" in caplog.messages[1]
    assert "Incomplete records of 1 run," in build_stress_report(out).read_text(encoding="utf-8")
    json.dumps(findings, allow_nan=False)
