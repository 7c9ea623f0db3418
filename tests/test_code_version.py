"""Which version of the code made a run: recorded with it, told when a grid is resumed with another one, shown in the report."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest

import lbw_rl
from lbw_rl.envs.recipe import load_recipe, override
from lbw_rl.training_runs.code_version import _digest, code_version
from lbw_rl.training_runs.compare import Arm, compare
from lbw_rl.training_runs.report import build_report
from lbw_rl.training_runs.results import read_results
from lbw_rl.training_runs.run import run

pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")
pytest.importorskip("scipy", reason="needs the extra lbw-rl[report]")
pytest.importorskip("plotly", reason="needs the extra lbw-rl[report]")

ARMS = [Arm("AdamW", "constant"), Arm("guard", "lbw-guard")]


@pytest.fixture
def recipe(tiny):
    return override(load_recipe("mini-qwen2"), tiny)


@pytest.fixture
def be(monkeypatch):
    """Makes this process one of another version of the package."""

    def version(number):
        monkeypatch.setattr(lbw_rl, "__version__", number)
        code_version.cache_clear()
        return code_version()

    yield version
    code_version.cache_clear()


def summary(folder: Path):
    return json.loads((folder / "summary.json").read_text())


def test_the_digest_is_of_what_decides_a_run(tmp_path):
    root = tmp_path / "lbw_rl"
    shutil.copytree(Path(lbw_rl.__file__).parent, root, ignore=shutil.ignore_patterns("__pycache__"))
    ours = code_version()
    assert re.fullmatch(re.escape(lbw_rl.__version__) + r"\+[0-9a-f]{8}", ours)
    assert ours.endswith(_digest(root))
    for harmless in (
        "cli/app.py",
        "training_runs/report_text.py",
        "training_runs/stress/suite.py",
        "controllers/a.pyc",
    ):
        with (root / harmless).open("a") as file:
            file.write("\n")
    assert ours.endswith(_digest(root))
    seen = {_digest(root)}
    policy = next((root / "controllers/pretrained").glob("*/policy.safetensors")).relative_to(root)
    for decisive in ("governor.py", "controllers/lbw_guard.py", "envs/task.py", "training_runs/run.py", policy):
        with (root / decisive).open("a") as file:
            file.write("\n")
        assert _digest(root) not in seen
        seen.add(_digest(root))


def test_a_grid_resumed_with_other_code_says_so_once_and_its_results_tell_the_runs_apart(
    recipe, tmp_path, in_process, be, caplog
):
    caplog.set_level(logging.WARNING, "lbw_rl")
    old = be("0.1.9")
    compare(recipe, ARMS, [1.0, 3.0], 1, tmp_path)
    assert not caplog.messages
    unrecorded = tmp_path / read_results(tmp_path).rows[0].folder / "summary.json"  # as of a version that wrote none
    unrecorded.write_text(json.dumps({k: v for k, v in summary(unrecorded.parent).items() if k != "code"}))

    new = be("0.2.0")
    results = compare(recipe, ARMS, [1.0, 3.0, 9.0], 1, tmp_path, resume=True)
    assert caplog.messages == [
        f"4 of the 4 finished runs in {tmp_path} are of another version of the code ({old}: 3, unrecorded: 1; now {new}) and "
        "are used as they are: to run everything with one version, use a new --out"
    ]
    assert {(r.lr_multiplier, r.code) for r in results.rows} == {(1.0, ""), (1.0, old), (3.0, old), (9.0, new)}
    words = f"{old}: 3 runs, {new}: 2 runs, unrecorded: 1 run"
    assert read_results(tmp_path).summary["provenance"]["code"] == words
    assert f"Runs of 3 versions of the code ({words})" in build_report(tmp_path).read_text(encoding="utf-8")


def test_one_version_is_recorded_and_not_worth_a_word(recipe, tmp_path, in_process, caplog):
    for resume in (False, True):
        results = compare(recipe, ARMS, [1.0], 1, tmp_path, resume=resume)
    assert {r.code for r in results.rows} == {code_version()}
    assert results.summary["provenance"]["code"] == code_version()
    assert "versions of the code" not in build_report(tmp_path).read_text(encoding="utf-8")
    assert not caplog.messages


def test_a_damaged_summary_is_no_reason_to_stop_counting(recipe, tmp_path, in_process, be, caplog):
    compare(recipe, ARMS, [1.0], 1, tmp_path)
    damaged = tmp_path / read_results(tmp_path).rows[0].folder / "summary.json"
    damaged.write_text("{")
    be("0.2.1")
    with pytest.raises(ValueError, match=rf"^resume: {damaged} is damaged"):
        compare(recipe, ARMS, [1.0], 1, tmp_path, resume=True)
    assert caplog.messages[0].startswith("2 of the 2 finished runs in ")


def test_a_run_that_two_versions_had_a_part_in_names_both(recipe, tmp_path, be, caplog):
    saving = override(recipe, ["train.checkpoint_every=2"])

    def stop(done, total, loss):
        if done == 5:
            raise KeyboardInterrupt

    old = be("0.1.9")
    with pytest.raises(KeyboardInterrupt):
        run(saving, tmp_path, progress=stop)
    new = be("0.2.0")
    with pytest.raises(KeyboardInterrupt):
        run(saving, tmp_path, resume=True, progress=stop)
    assert run(saving, tmp_path, resume=True)["code"] == summary(tmp_path)["code"] == f"{old}, then {new}"
    assert caplog.messages[0] == f"the run in {tmp_path} was begun by another version of the code, {old}"
