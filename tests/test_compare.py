"""The grid: pairing, resuming, the arms' syntax, and what a kill leaves behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from lbw_rl.envs.recipe import ControllerSpec, load_recipe, override
from lbw_rl.training_runs.compare import Arm, compare, parse_arms, parse_multiplier
from lbw_rl.training_runs.results import Results, read_results

pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra lbw-rl[report]")
pytest.importorskip("scipy", reason="needs the extra lbw-rl[report]")

PLAIN, CLIPPED = Arm("AdamW", "constant"), Arm("clip", "constant", ("optimizer.grad_clip=1.0",))
GUARD = Arm("guard", "lbw-guard")


@pytest.fixture
def recipe(tiny):
    return override(load_recipe("mini-qwen2"), tiny)


def summaries(folder: Path) -> dict[Path, int]:
    """Every finished run and when it finished."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/summary.json")}


def by_cell(results: Results, arm: str) -> dict[tuple[float, int], object]:
    return {(r.lr_multiplier, r.seed): r for r in results.rows if r.arm == arm}


# ---- how a grid is asked for


@pytest.mark.parametrize(
    ("text", "arms"),
    [
        ("pid", [Arm("pid", "pid")]),
        (
            "constant,constant@optimizer.grad_clip=1.0",
            [
                Arm("constant", "constant"),
                Arm("constant@optimizer.grad_clip=1.0", "constant", ("optimizer.grad_clip=1.0",)),
            ],
        ),
        (
            "AdamW + clip:=constant@optimizer.grad_clip=1.0@optimizer.betas=[0.9,0.95], guard:=lbw-guard",
            [
                Arm("AdamW + clip", "constant", ("optimizer.grad_clip=1.0", "optimizer.betas=[0.9,0.95]")),
                Arm("guard", "lbw-guard"),
            ],
        ),
    ],
)
def test_arms(text, arms):
    assert parse_arms(text) == arms


def test_an_arm_may_be_the_folder_of_a_policy(policy_folder):
    assert parse_arms(f"ours:={policy_folder}") == [Arm("ours", str(policy_folder))]


@pytest.mark.parametrize("text", ["nobody", "pid,", "x:=nobody", "pid,,constant"])
def test_unknown_arms(text):
    with pytest.raises(ValueError, match=r"^controller: unknown name .*accepted: constant, pid"):
        parse_arms(text)


@pytest.mark.parametrize(
    ("text", "value"), [("30", 30.0), ("0.03", 0.03), (" 1/30 ", 1 / 30), ("3/2", 1.5), ("1e-2", 0.01)]
)
def test_multipliers(text, value):
    assert parse_multiplier(text) == value


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "x", "1/0", "1/", "/3", "nan", "inf", "1e400", "1e999999999", "1/inf", "1/2/3"]
)
def test_multipliers_that_are_none(text):
    with pytest.raises(ValueError, match=r"^lr-multipliers: .* is no multiplier; accepted: numbers > 0"):
        parse_multiplier(text)


@pytest.mark.parametrize(
    ("arms", "multipliers", "seeds", "reason"),
    [
        ([], [1.0], 1, "controllers: none given"),
        ([PLAIN, PLAIN], [1.0], 1, "controllers: AdamW, AdamW; accepted: one or more, each once"),
        ([PLAIN], [], 1, "lr-multipliers: none given"),
        ([PLAIN], [1.0, 30.0, 1.0], 1, "lr-multipliers: 1, 30, 1; accepted: one or more, each once"),
        ([PLAIN], [1.0], 0, "seeds: 0 must be at least 1"),
        (
            [Arm("x", "pid", ("controller.options.nope=1",))],
            [1.0],
            1,
            "controller.options.nope: pid has no such option",
        ),
        ([Arm("x", "pid", ("no.such=1",))], [1.0], 1, "no.such: unknown key"),
    ],
)
def test_grids_that_are_refused_before_anything_runs(arms, multipliers, seeds, reason, recipe, tmp_path):
    with pytest.raises(ValueError) as caught:
        compare(recipe, arms, multipliers, seeds, tmp_path / "out")
    assert str(caught.value).startswith(reason)
    assert not (tmp_path / "out").exists()


# ---- what it finds


def test_the_grid(recipe, tmp_path, in_process):
    seen = []
    multipliers = [parse_multiplier("1/30"), 1.0, 1e4]
    results = compare(
        recipe,
        [PLAIN, CLIPPED, GUARD],
        multipliers,
        2,
        tmp_path,
        progress=lambda done, total, row: seen.append((done, total, row.arm)),
        command="lbw-rl compare …",
    )
    assert len(results.rows) == 18
    assert [s[:2] for s in seen] == [(i + 1, 18) for i in range(18)]
    assert [(r.seed, r.lr_multiplier, r.arm) for r in results.rows] == [
        (seed, multiplier, arm) for seed in (0, 1) for multiplier in multipliers for arm in ("AdamW", "clip", "guard")
    ]
    # Paired: one seed, one set of initial weights and batches, whatever the arm.
    by_seed = [{r.initial_loss for r in results.rows if r.seed == seed} for seed in (0, 1)]
    assert [len(losses) for losses in by_seed] == [1, 1]
    assert by_seed[0] != by_seed[1]
    first = {
        json.loads((tmp_path / r.folder / "metrics.jsonl").read_text().splitlines()[0])["loss"] for r in results.rows
    }
    assert len(first) == 2

    assert {r.optimizer for r in results.rows if r.arm == "clip"} == {"adamw+clip1"}
    assert {r.controller for r in results.rows if r.arm == "guard"} == {"lbw-guard"}
    assert {r.base_lr for r in results.rows} == {recipe.optimizer.lr}
    for row in results.rows:
        record = json.loads((tmp_path / row.folder / "summary.json").read_text())
        assert row.final_loss == record["final_loss"]
        assert row.diverged == record["diverged"]
    assert len({r.folder for r in results.rows}) == 18

    # What diverged is there, capped, and counted.
    wild = by_cell(results, "AdamW")[1e4, 0]
    assert wild.diverged
    assert wild.final_loss == wild.initial_loss
    counted = {a["arm"]: a["diverged"] for a in results.summary["arms"]}
    assert counted == {arm: sum(r.diverged for r in results.rows if r.arm == arm) for arm in counted}
    assert counted["AdamW"] >= 2

    back = read_results(tmp_path)
    assert back.rows == results.rows
    assert back.summary == json.loads(json.dumps(results.summary))
    table = parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert [(r["arm"], r["seed"], r["final_loss"]) for r in table] == [
        (r.arm, r.seed, r.final_loss) for r in results.rows
    ]
    provenance = results.summary["provenance"]
    assert provenance["command"] == "lbw-rl compare …"
    assert (
        provenance["corpus_sha256"]
        == json.loads((tmp_path / results.rows[0].folder / "summary.json").read_text())["corpus_sha256"]
    )
    assert provenance["corpus"] == "text.txt"  # a name, not a path of this machine
    assert {"lbw-rl", "torch", "transformers", "numpy"} == set(provenance["versions"])


def test_steps_to_target(recipe, tmp_path, in_process):
    longer = override(recipe, ["train.steps=40", "train.eval_every=4"])
    results = compare(longer, [PLAIN, GUARD], [1.0, 10.0], 3, tmp_path)
    finals = {
        m: sorted(r.final_loss for r in results.rows if (r.arm, r.lr_multiplier) == ("AdamW", m))[1]
        for m in (1.0, 10.0)
    }
    target = min(finals.values())  # the median run of plain AdamW at its best multiplier
    reached = 0
    for row in results.rows:
        metrics = [json.loads(line) for line in (tmp_path / row.folder / "metrics.jsonl").read_text().splitlines()]
        steps = [m["step"] + 1 for m in metrics if m["eval_loss"] is not None and m["eval_loss"] <= target]
        assert row.steps_to_target == (steps[0] if steps else None)
        reached += bool(steps)
    assert 0 < reached < len(results.rows)
    assert all(r.steps_to_target is None or r.steps_to_target % 4 == 0 for r in results.rows)


def test_options_of_the_recipes_controller_stay_with_it(recipe, tmp_path, in_process):
    tuned = recipe.model_copy(update={"controller": ControllerSpec(name="pid", options={"ki": 0.2})})
    results = compare(tuned, [Arm("pid", "pid"), PLAIN], [1.0], 1, tmp_path)
    recipes = {r.arm: json.loads((tmp_path / r.folder / "recipe.json").read_text()) for r in results.rows}
    assert recipes["pid"]["controller"] == {"name": "pid", "options": {"ki": 0.2}}
    assert recipes["AdamW"]["controller"] == {"name": "constant", "options": {}}


# ---- resuming


def test_resuming_repeats_no_finished_run(recipe, tmp_path, in_process):
    first = compare(recipe, [PLAIN], [1.0, 30.0], 2, tmp_path)
    finished = summaries(tmp_path)
    assert len(finished) == 4
    (tmp_path / first.rows[-1].folder / "summary.json").unlink()  # as if it had been killed in its last run
    del finished[tmp_path / first.rows[-1].folder / "summary.json"]
    again = compare(recipe, [PLAIN, GUARD], [1.0, 30.0], 2, tmp_path, resume=True)
    assert len(again.rows) == 8
    after = summaries(tmp_path)
    assert len(after) == 8
    assert {path: after[path] for path in finished} == finished
    losses = {key: row.final_loss for key, row in by_cell(again, "AdamW").items()}
    assert losses == {key: row.final_loss for key, row in by_cell(first, "AdamW").items()}


def test_a_grid_of_another_recipe_is_not_resumed(recipe, tmp_path, in_process):
    compare(recipe, [PLAIN], [1.0], 1, tmp_path)
    with pytest.raises(ValueError, match=r"^out: .* is not empty"):
        compare(recipe, [PLAIN], [1.0], 1, tmp_path)
    other = override(recipe, ["train.steps=7"])
    with pytest.raises(ValueError, match=r"^resume: .* another recipe \(differs in train.steps\)"):
        compare(other, [PLAIN], [1.0], 1, tmp_path, resume=True)


@pytest.fixture
def grid(tiny, tmp_path):
    """Starts `lbw-rl compare` on a grid of six runs of a second or so, in two worker processes."""
    started = []

    def start(*arguments: str) -> subprocess.Popen:
        settings = [part for setting in [*tiny, "train.steps=150"] for part in ("--set", setting)]
        command = [sys.executable, "-c", "from lbw_rl.cli import main; main()", "compare", "mini-qwen2", *settings]
        command += ["--controllers", "constant,pid", "--lr-multipliers", "1", "--seeds", "3", "--workers", "2"]
        command += ["--out", str(tmp_path / "out"), *arguments]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell starts its background jobs deaf to Ctrl-C, and they hand that on.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def first_run_finished(process: subprocess.Popen, folder: Path) -> list[psutil.Process]:
    """Waits for the grid's first summary; the worker processes at that moment."""
    deadline = time.monotonic() + 120
    while not summaries(folder):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [p for p in psutil.Process(process.pid).children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]


@pytest.mark.parametrize("kill", ["SIGKILL", pytest.param("Ctrl-C", marks=pytest.mark.slow)])
def test_a_killed_grid_leaves_no_orphan_and_resumes(kill, grid, recipe, tmp_path, in_process):
    folder = tmp_path / "out"
    process = grid()
    workers = first_run_finished(process, folder)
    if kill == "SIGKILL":
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    else:
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
        assert (process.returncode, stdout) == (130, "")
        assert stderr.splitlines()[-1].startswith("lbw-rl: interrupted; the same command with --resume")
        assert "Traceback" not in stderr
    assert len(workers) == 2
    assert psutil.wait_procs(workers, timeout=20)[1] == []  # an orphan would write where the resumed grid writes
    finished = summaries(folder)
    assert 1 <= len(finished) < 6
    assert not (folder / "results.json").exists()

    longer = override(recipe, ["train.steps=150"])
    results = compare(longer, parse_arms("constant,pid"), [1.0], 3, folder, resume=True)
    after = summaries(folder)
    assert len(results.rows) == len(after) == 6
    assert {path: after[path] for path in finished} == finished


@pytest.mark.slow
def test_a_dead_worker_is_told_in_one_line_and_the_grid_resumes(grid, tmp_path):
    folder = tmp_path / "out"
    process = grid()
    first_run_finished(process, folder)[0].kill()
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert stdout == ""
    assert stderr.splitlines()[-1].startswith("lbw-rl: a worker process died")
    assert "Traceback" not in stderr
    finished = summaries(folder)
    process = grid("--resume", "--json")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert len(json.loads(stdout)["rows"]) == 6
    after = summaries(folder)
    assert {path: after[path] for path in finished} == finished


@pytest.mark.slow
def test_ray_finds_what_local_processes_find(recipe, tmp_path):
    pytest.importorskip("ray", reason="needs the extra lbw-rl[ray]")
    arms, timing = [PLAIN, GUARD], {"seconds", "overhead_seconds"}
    found = {}
    for backend in ("local", "ray"):
        results = compare(recipe, arms, [1.0, 30.0], 2, tmp_path / backend, backend=backend, workers=1)
        found[backend] = [row.model_dump(exclude=timing) for row in results.rows]
    assert found["ray"] == found["local"]

    with pytest.raises(ValueError) as caught:  # a bad run is told as it is locally: one line, no traceback of Ray's
        compare(override(recipe, ["data.corpus=absent.txt"]), arms, [1.0], 1, tmp_path / "bad", backend="ray")
    assert str(caught.value).startswith("data.corpus: 'absent.txt' is no known corpus")
    assert "\n" not in str(caught.value)


def test_ray_that_is_not_installed(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ValueError, match=r"^backend: 'ray' needs the package ray; accepted: pip install 'lbw-rl\[ray\]'"
    ):
        compare(recipe, [PLAIN], [1.0], 1, tmp_path, backend="ray")
