"""`lbw-rl stress` from end to end: three stages, kills, another budget, the report; real runs of a tiny model."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import psutil
import pytest

from lbw_rl.training_runs.results import read_results
from lbw_rl.training_runs.stress.suite import ALL, GUARD, TUNED

pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")
pytest.importorskip("plotly", reason="needs the extra lbw-rl[report]")
pytest.importorskip("scipy", reason="needs the extra lbw-rl[report]")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FAMILIES = ("mini-qwen2-150", "mini-llama-1000")


def summaries(folder: Path) -> dict[Path, int]:
    """Every finished run and when it finished."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/summary.json")}


def content(folder: Path, name: str):
    return json.loads((folder / name).read_text(encoding="utf-8"))


class Text(HTMLParser):
    """The visible text of a page, and whether its tags close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page, flags=re.DOTALL))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "path", "circle", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("path", "circle"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def __contains__(self, text: str) -> bool:
        return text in " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def killed(tiny, tmp_path_factory):
    """A suite on two families, killed with SIGKILL in its search and in its grid; what was finished after each kill."""
    folder = tmp_path_factory.mktemp("suite") / "out"
    settings = [part for setting in [*tiny, "train.steps=12"] for part in ("--set", setting)]
    command = [sys.executable, "-c", "from lbw_rl.cli import main; main()", "stress", "--families", ",".join(FAMILIES)]
    command += [*settings, "--workers", "1", "--out", str(folder), "--json"]
    finished = []

    def kill_when(ready) -> None:
        resume = ["--resume"] if finished else []
        with subprocess.Popen(
            [*command, *resume], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        ) as process:
            try:
                deadline = time.monotonic() + 240
                while not ready():
                    assert process.poll() is None, process.communicate()
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                workers = psutil.Process(process.pid).children(recursive=True)
                process.kill()
                process.wait()
                assert (
                    psutil.wait_procs(workers, timeout=20)[1] == []
                )  # an orphan would write where the resumed suite writes
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        finished.append(summaries(folder))

    kill_when(lambda: len(summaries(folder)) >= 5)
    assert not (folder / "tuning.json").exists()
    kill_when(lambda: (folder / "tuning.json").exists() and len(summaries(folder)) > content_runs(folder) + 3)
    assert not (folder / "stress.json").exists()
    return folder, command, finished


def content_runs(folder: Path) -> int:
    return sum(found["runs_spent"] for found in content(folder, "tuning.json").values())


@pytest.fixture(scope="module")
def suite(killed):
    """The same suite, resumed to its end."""
    folder, command, finished = killed
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done.stderr, finished


def test_a_killed_suite_repeats_no_finished_run_in_any_stage(suite):
    folder, findings, _, finished = suite
    after = summaries(folder)
    assert len(finished[0]) >= 5
    for before in finished:
        assert {path: after[path] for path in before} == before
    assert len(finished[1]) < len(after)
    assert findings == content(folder, "stress.json")


def test_progress_in_a_pipe_comes_in_whole_lines_by_stage(suite):
    _, _, stderr, _ = suite
    lines = [line for line in stderr.splitlines() if re.match(r"\d/3 ", line)]
    assert lines
    for line in lines:
        assert re.fullmatch(
            r"(1/3 tuning AdamW|2/3 grid): \d+/\d+ \[\d:\d\d:\d\d elapsed(, \d:\d\d:\d\d left)?\] mini-\S+ · .+ at \S+: loss \d\.\d{3}",
            line,
        )
    assert {line[:3] for line in lines} == {"1/3", "2/3"}


def test_the_baseline_was_searched_for_in_each_family(suite):
    folder, findings, _, _ = suite
    tuning = content(folder, "tuning.json")
    assert tuple(tuning) == FAMILIES
    for family in findings["families"]:
        found = tuning[family["name"]]
        assert found["runs_spent"] == len(found["runs"]) >= 20
        best = min(found["runs"], key=lambda run: run["final_loss"])
        assert (found["lr"], found["schedule"], found["final_loss"]) == (
            best["lr"],
            best["schedule"],
            best["final_loss"],
        )
        assert {run["schedule"] for run in found["runs"]} == {"constant", "linear", "cosine", "wsd"}
        for run in found["runs"]:
            recorded = content(folder / run["folder"], "recipe.json")
            assert (recorded["optimizer"]["lr"], recorded["schedule"]["name"]) == (run["lr"], run["schedule"])
            assert content(folder / run["folder"], "summary.json")["final_loss"] == run["final_loss"]
        assert family["tuned"] == {key: value for key, value in found.items() if key != "runs"}


def test_the_rows_are_those_of_the_grid_around_what_was_found(suite):
    folder, findings, _, _ = suite
    results = read_results(folder)
    assert findings["runs"] == len({row.folder for row in results.rows})
    assert len(results.rows) == 2 * 3 * 4
    assert results.summary["reference_arm"] == TUNED
    tuning = content(folder, "tuning.json")
    for row in results.rows:
        assert row.base_lr == tuning[row.recipe]["lr"]
        summary = content(folder / row.folder, "summary.json")
        assert summary["mode"] == ("govern" if row.arm == GUARD else "off")
        assert row.final_loss == summary["final_loss"]
    first = {r.recipe: r for r in results.rows if (r.arm, r.lr_multiplier) == (TUNED, 1.0)}
    for name in FAMILIES:  # the search's best run is the baseline's own cell: it was run once
        assert first[name].folder in {run["folder"] for run in tuning[name]["runs"]}
    assert (folder / "results.parquet").is_file()


def test_the_findings_judge_what_was_measured(suite):
    _, findings, _, _ = suite
    assert [target["id"] for target in findings["targets"]] == [
        "sensitivity", "sensitivity-rival", "worst", "tuned-mean", "tuned-each", "rollbacks", "interventions", "steps", "seconds",
    ]  # fmt: skip
    for family in findings["families"]:
        arms = {arm["arm"]: arm for arm in family["arms"]}
        assert tuple(arms) == (TUNED, "Schedule-Free", GUARD)
        for target, key in (("sensitivity", "lr_sensitivity"), ("worst", "worst_ratio"), ("tuned-each", "ratio")):
            judged = next(t for t in findings["targets"] if t["id"] == target)
            assert judged["families"][family["name"]] == arms[GUARD][key]
        assert family["reference"]["loss"] == min(arms[TUNED]["losses"])
    assert findings["preview"][:3] == ["1 seed of 3", "4 of 8 multipliers", "2 of 12 families"]
    assert findings["provenance"]["command"].startswith("lbw-rl stress --families")


def test_the_report_holds_every_table_and_a_panel_a_family(suite, lbw):
    folder, findings, _, _ = suite
    page = (folder / "report.html").read_text(encoding="utf-8")
    text = Text(page)
    for family in FAMILIES:
        assert f"{family}: final held-out perplexity" in text
        assert f"{family}: time, cost, interventions" in text
    assert "missed in" in text or "in all 2" in text
    for claim in ("13.21", "10.74", "−18.7 %", "392.54 s", "357.02 s", "1885.24", "11.57", "659.76", "10.33"):
        assert claim in text
    assert "mini-qwen2-lora, not run" in text
    assert "A preview: 1 seed of 3; 4 of 8 multipliers; 2 of 12 families" in text
    judged = [t for t in findings["targets"] if t["met"] is not None]
    assert f"meets {sum(t['met'] for t in judged)} of the {len(judged)} targets" in text
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', page, re.DOTALL)[1])
    assert set(figures) == {"family0", "family1"}
    traces = figures["family0"]["data"]
    assert {trace["meta"] for trace in traces} == {TUNED, "Schedule-Free", GUARD}
    guard = next(trace for trace in traces if trace["meta"] == GUARD)
    arms = {arm["arm"]: arm for arm in findings["families"][0]["arms"]}
    assert guard["y"] == pytest.approx(arms[GUARD]["losses"])

    (folder / "report.html").unlink()
    answer = lbw("report", folder)
    assert answer.code == 0
    assert "LBW-Guard-style against its targets" in answer.out
    assert (folder / "report.html").read_text(encoding="utf-8") == page


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the figures were not drawn")
def test_a_browser_draws_a_panel_a_family(suite, tmp_path):
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync "
    flags += "--virtual-time-budget=5000 --window-size=1200,5000 --dump-dom"
    command = [str(CHROMIUM), *flags.split(), f"--user-data-dir={tmp_path}", (suite[0] / "report.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    drawn = re.findall(r'<div class="plot[^>]*id="(family\d)"[^>]*>.{0,200}?plot-container', dom, re.DOTALL)
    assert drawn == ["family0", "family1"]
    assert 'class="xtick"' in dom


def test_more_of_the_same_suite_adds_to_the_folder(suite, lbw, tiny, tmp_path, in_process, caplog):
    """Another family: the first one's runs are found, and the report is of what was asked for."""
    folder = tmp_path / "copy"
    shutil.copytree(suite[0], folder)
    row = next(r for r in read_results(folder).rows if (r.recipe, r.arm) == (FAMILIES[0], GUARD))
    older = {**content(folder / row.folder, "summary.json"), "code": "0.1.9+00000000"}
    (folder / row.folder / "summary.json").write_text(json.dumps(older), encoding="utf-8")
    before = summaries(folder)
    settings = [part for setting in [*tiny, "train.steps=12"] for part in ("--set", setting)]
    families = "mini-qwen2-150,mini-qwen2-batch32"
    findings = lbw("stress", "--families", families, *settings, "--out", folder, "--resume", "--json").json()
    assert [family["name"] for family in findings["families"]] == families.split(",")
    assert [m.split(" finished")[0] for m in caplog.messages] == [f"1 of the {len(before)}"]
    assert findings["provenance"]["code"] == f"{row.code}: {findings['runs'] - 1} runs, 0.1.9+00000000: 1 run"
    assert "Runs of 2 versions of the code" in (folder / "report.html").read_text(encoding="utf-8")
    after = summaries(folder)
    assert {path: after[path] for path in before} == before
    assert {path.relative_to(folder).parts[1] for path in set(after) - set(before)} == {"mini-qwen2-batch32"}

    refused = lbw("stress", "--families", families, *settings, "--set", "train.steps=13", "--out", folder, "--resume")
    assert refused.refusal().startswith(f"resume: {folder} was started with --set ")
    assert lbw("stress", "--families", families, *settings, "--out", folder).refusal().startswith("out: ")
    assert (
        lbw("stress", "--suite", "tinyllama", *settings, "--out", folder, "--resume")
        .refusal()
        .startswith(f"resume: {folder} was started with --suite mini, not tinyllama")
    )


def test_a_damaged_folder_is_told_in_one_line(lbw, tmp_path):
    (tmp_path / "stress.json").write_text("{")
    assert lbw("report", tmp_path).refusal().startswith(f"stress: {tmp_path / 'stress.json'} is damaged")


# ---- every arm, and the suites of real size


def test_every_arm_of_the_mini_suite_runs_and_the_governor_is_replayed(lbw, small, tmp_path, in_process):
    findings = lbw("stress", "--families", "mini-qwen2", *small, "--out", tmp_path / "out", "--json").json()
    (family,) = findings["families"]
    arms = {arm["arm"]: arm for arm in family["arms"]}
    thorough = {"AdamW + clip 0.5", *(f"{GUARD} on {s}" for s in ("constant", "linear", "cosine", "wsd"))}
    assert set(arms) == set(ALL) - thorough
    rows = read_results(tmp_path / "out").rows
    replay = next(r for r in rows if (r.arm, r.lr_multiplier) == ("open-loop replay", 30.0))
    governed = next(r for r in rows if (r.arm, r.lr_multiplier) == (GUARD, 1.0))
    scales = content(tmp_path / "out" / replay.folder, "recipe.json")["controller"]["options"]["scales"]
    executed = [
        json.loads(line)["executed"]["lr_scale"]
        for line in (tmp_path / "out" / governed.folder / "ledger.jsonl").read_text().splitlines()
        if '"type":"decision"' in line
    ]
    assert scales == pytest.approx(executed, rel=1e-5)


def test_the_sources_grid_runs_on_a_local_model(lbw, small, tmp_path, in_process, make_local_model):
    """The suite of 7B recipes with a tiny model in their place: the same code path as on an accelerator."""
    settings = [*small, "--set", f"model.path={make_local_model}", "--set", "data.tokenizer=bpe"]
    settings += [
        "--set",
        "model.dtype=float32",
        "--set",
        "optimizer.implementation=foreach",
        "--set",
        "model.lora_rank=2",
    ]
    listed = lbw("stress", "--suite", "qwen2.5", "--dry-run", "--json", *settings).json()
    assert listed["counts"] == {"tuning": 0, "grid": 18, "replay": 0}
    assert sorted({run["lr"] for run in listed["runs"]}) == pytest.approx([3e-4, 1e-3, 3e-3])
    assert {run["settings"].get("optimizer.grad_clip") for run in listed["runs"]} == {None, 0.5, 1.0}
    findings = lbw("stress", "--suite", "qwen2.5", *settings, "--out", tmp_path / "out", "--json").json()
    assert findings["reference_arm"] == "AdamW"
    rows = {row["what"]: row for row in findings["source_table"]}
    assert rows["LR 3e-3"]["ours_adamw"] > 0
    assert rows["LR 3e-3, AdamW + clip 0.5"]["ours_adamw"] > 0
    assert rows["Model size: 14B"]["ours_adamw"] is None
    assert "qwen2.5-14b, not run" in Text((tmp_path / "out/report.html").read_text(encoding="utf-8"))


@pytest.fixture
def make_local_model(tmp_path):
    import torch
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Qwen2Config(vocab_size=300, num_key_value_heads=1, max_position_embeddings=64, **shape)
    folder = tmp_path / "model"
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_dry_run_lists_every_run_and_writes_nothing(lbw, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = lbw("stress", "--families", "mini-qwen2-150", "--dry-run", *small)
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert len(lines) == 20 + 12 + 1
    assert lines[-1].startswith("32 runs: 20 tuning, 12 grid; the search for AdamW's rate may add some")
    guard = [line for line in lines if line.startswith("grid") and GUARD in line]
    assert len(guard) == 4
    assert all("controller.name=lbw-guard" in line for line in guard)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_start_leaves_an_empty_folder(lbw, small, tmp_path, in_process):
    arguments = ["stress", "--families", "mini-qwen2-150", *small, "--out", tmp_path / "out"]
    refused = lbw(*arguments, "--set", "data.corpus=absent.txt").refusal()
    assert refused.startswith("data.corpus: 'absent.txt' is no known corpus")
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_input_is_told_in_one_line(lbw):
    assert lbw("stress", "--suite", "maxi").refusal().startswith("suite: 'maxi' is unknown; accepted: mini")
    assert lbw("stress", "--budget", "huge").refusal().startswith("budget: 'huge' is unknown; accepted: quick, full")
    assert lbw("stress", "--backend", "slurm", "--families", "mini-qwen2-150").refusal().startswith("backend: 'slurm'")
    assert (
        lbw("stress", "--set", "train.seed=1")
        .refusal()
        .startswith("set: train.seed=1 is for the suite's arms to decide")
    )
