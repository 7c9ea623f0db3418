"""The command line: help, answers, progress."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest
import typer
from rich.table import Table

from lbw_rl.cli import console
from lbw_rl.cli.app import app
from lbw_rl.cli.pace import Pace
from lbw_rl.controllers.ppo import newest_pretrained
from lbw_rl.extras import EXTRAS

pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")

COMMANDS = {
    "demo",
    "train-policy",
    "evaluate",
    "run",
    "compare",
    "stress",
    "report",
    "replay",
    "policy inspect",
    "policy verify",
    "doctor",
}


# ---- help


def commands() -> dict[str, Any]:
    """Full name → command, subcommands included."""
    found = {}

    def walk(command: Any, name: str) -> None:
        children = getattr(command, "commands", None)
        if children is None:
            found[name.strip()] = command
        for child, below in (children or {}).items():
            walk(below, f"{name} {child}")

    walk(typer.main.get_command(app), "")
    return found


def test_the_commands():
    assert set(commands()) == COMMANDS


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_explains_and_shows_an_example_that_would_parse(command, lbw):
    answer = lbw(*command.split(), "--help")
    assert (answer.code, answer.err) == (0, "")
    assert "Example" in answer.out
    definition = commands()[command]
    (example,) = re.findall(r"`lbw-rl (.+)`", definition.epilog)
    assert example.startswith(command)
    options = {name for parameter in definition.params for name in parameter.opts}
    assert set(re.findall(r"(?<!\S)--[a-z-]+", example)) <= options
    for parameter in definition.params:
        assert getattr(parameter, "help", None), f"{parameter.name} is not explained"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_arguments_it_shows_its_commands(arguments, lbw):
    answer = lbw(*arguments)
    assert answer.code == 0
    assert all(command.split()[0] in answer.out for command in COMMANDS)


def test_a_group_without_a_command_shows_its_commands(lbw):
    answer = lbw("policy")
    assert answer.code == 2
    assert "inspect" in answer.out + answer.err
    assert "lbw-rl: " not in answer.err


def test_help_and_a_bad_recipe_do_not_wait_for_torch():
    program = (
        "import sys, contextlib\nfrom lbw_rl.cli import main\n"
        "for arguments in (['--help'], ['run', '--help'], ['run', 'nobody'], ['compare', 'nobody']):\n"
        "    sys.argv = ['lbw-rl', *arguments]\n"
        "    with contextlib.suppress(SystemExit):\n        main()\n"
        "print(sorted({'torch', 'transformers', 'scipy', 'plotly'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# ---- answers


def test_run(lbw, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = lbw("run", "mini-qwen2", "--controller", "pid", *small)
    assert answer.code == 0
    summary = json.loads((tmp_path / "runs/mini-qwen2-pid/summary.json").read_text())
    assert (
        f"mini-qwen2 · pid: held-out loss {summary['final_loss']:.4f} nats (perplexity {summary['final_ppl']:.2f})"
        in answer.out
    )
    assert "of 6 decisions intervened" in answer.out
    assert answer.out.endswith("files: runs/mini-qwen2-pid\n")
    assert re.fullmatch(r"mini-qwen2 · pid: 6/6 \[\d:\d\d:\d\d elapsed\] loss \d\.\d{3}\n", answer.err)

    assert (
        lbw("run", "mini-qwen2", "--controller", "pid", *small)
        .refusal()
        .startswith("out: runs/mini-qwen2-pid is not empty")
    )
    again = lbw("run", "mini-qwen2", "--controller", "pid", *small, "--resume", "--json")
    assert again.json() == summary
    assert again.err == ""

    shadow = lbw(
        "run", "mini-qwen2", "--controller", "pid", *small, "--mode", "shadow", "--out", "shadow", "--json"
    ).json()
    assert (shadow["mode"], shadow["controller"]) == ("shadow", "pid")
    wild = lbw("run", "mini-qwen2", *small, "--set", "train.lr_multiplier=1e4", "--out", "wild")
    assert "(diverged)" in wild.out


def test_a_path_with_brackets_is_printed_as_it_is(lbw, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert lbw("run", "mini-llama", *small, "--out", "[/red] :bug: [bold]x").out.endswith(
        "files: [/red] :bug: [bold]x\n"
    )


def test_the_recipes_own_controller_options_do_not_reach_another_controller(lbw, small, tmp_path, tiny):
    text = (
        'name = "tuned"\n[model]\narchitecture = "llama"\n[controller]\nname = "pid"\n[controller.options]\nki = 0.2\n'
    )
    (tmp_path / "tuned.toml").write_text(text)
    for arguments, expected in (
        ([], {"name": "pid", "options": {"ki": 0.2}}),
        (["--controller", "pid"], {"name": "pid", "options": {"ki": 0.2}}),
        (["--controller", "lbw-guard"], {"name": "lbw-guard", "options": {}}),
        (
            ["--controller", "lbw-guard", "--set", "controller.options.half_life=3.0"],
            {"name": "lbw-guard", "options": {"half_life": 3.0}},
        ),
    ):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert lbw("run", tmp_path / "tuned.toml", *small, *arguments, "--out", out).code == 0
        assert json.loads((out / "recipe.json").read_text())["controller"] == expected


def test_compare_and_report(lbw, small, tmp_path, in_process):
    pytest.importorskip("plotly", reason="needs the extra lbw-rl[report]")
    folder = tmp_path / "cmp"
    arguments = ["compare", "mini-qwen2", *small, "--seeds", "2", "--lr-multipliers", "1/30,1,1e4", "--out", folder]
    arguments += ["--controllers", "AdamW:=constant,clip:=constant@optimizer.grad_clip=1.0,guard:=lbw-guard"]
    answer = lbw(*arguments)
    assert answer.code == 0
    for text in ("AdamW", "clip", "guard", f"report: {folder / 'report.html'}"):
        assert text in answer.out
    assert re.fullmatch(r"comparing on mini-qwen2: 18/18 \[\d:\d\d:\d\d elapsed\] \S+ ×\S+: \d\.\d{3}\n", answer.err)
    results = json.loads((folder / "results.json").read_text())
    assert "lbw-rl compare mini-qwen2" in results["summary"]["provenance"]["command"]

    again = lbw(*arguments, "--resume", "--json").json()
    assert again["schema"] == 1
    assert again["rows"] == results["rows"]

    (folder / "report.html").unlink()
    answer = lbw("report", folder)
    assert (answer.code, answer.err) == (0, "")
    assert (folder / "report.html").exists()
    assert "guard" in answer.out


def test_replay(lbw, small, tmp_path):
    assert lbw("run", "mini-qwen2", "--controller", "constant", *small, "--out", tmp_path / "out").code == 0
    ledger = tmp_path / "out/ledger.jsonl"
    same = lbw("replay", ledger, "--controller", "constant", "--json").json()
    assert (same["decisions"], same["differing"], same["faults"]) == (6, 0, 0)
    assert [s["step"] for s in same["steps"]] == list(range(6))
    other = lbw("replay", ledger, "--controller", "lbw-guard")
    assert (other.code, other.err) == (0, "")
    assert "lbw-guard on the telemetry of constant: " in other.out
    assert "regimes: calibrating 1" in other.out


def test_policy(lbw, policy_folder):
    header = lbw("policy", "inspect", policy_folder, "--json").json()
    assert header == json.loads((policy_folder / "policy.json").read_text())
    shown = lbw("policy", "inspect", policy_folder)
    assert shown.code == 0
    assert "lr_scale (0.01, 100.0)" in shown.out
    assert all(name in shown.out for name in header["features"])
    assert (
        "relative to lbw-guard, held through each of 3 parts of a run"
        in lbw("policy", "inspect", newest_pretrained()).out
    )
    answer = lbw("policy", "verify", policy_folder)
    assert answer.code == 0
    assert answer.out.startswith(f"intact: {policy_folder} (weights sha256 {header['weights_sha256'][:16]}…")


def test_doctor(lbw):
    findings = lbw("doctor", "--json").json()
    assert {"lbw-rl", "python", "torch", "cores", "memory", "cuda", "nvml", "policy", "links"} <= set(findings)
    assert findings["links"] == "ok"
    assert all(package in findings[f"extra {extra}"] for extra, packages in EXTRAS.items() for package in packages)
    answer = lbw("doctor")
    assert answer.code == 0
    assert len(answer.out.splitlines()) == len(findings)


def test_in_a_pipe_standard_output_holds_results_alone(small, tmp_path):
    command = [sys.executable, "-c", "from lbw_rl.cli import main; main()", "run", "mini-qwen2", "--json", *small]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads((tmp_path / "out/summary.json").read_text())
    assert re.fullmatch(r"mini-qwen2 · constant: 6/6 \[\d:\d\d:\d\d elapsed\] loss \d\.\d{3}\n", done.stderr)


# ---- progress


def test_progress_in_a_pipe_comes_in_whole_lines_and_not_too_often(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.meter("training") as meter:
        for step in range(1, 31):
            now[0] += 1.0
            meter.update(step, 30, f"loss {step}" if step < 30 else "")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "training: 10/30 [0:00:10 elapsed, 0:00:20 left] loss 10",
        "training: 20/30 [0:00:20 elapsed, 0:00:10 left] loss 20",
        "training: 30/30 [0:00:30 elapsed]",
    ]


def test_the_time_left_is_told_by_the_pace_of_late():
    """A resumed grid finds 200 runs in its first second; the hundred that are left take 20 s each, on two workers."""
    pace = Pace()
    assert pace.left(5.0, 1, 300) is None  # one piece, and no telling when it was begun
    for found in range(2, 201):
        pace.left(5.0 + found / 200, found, 300)
    for run in range(1, 101):
        elapsed = 6.0 + 10.0 * run
        left = pace.left(elapsed, 200 + run, 300)
        assert left == pytest.approx(10.0 * (100 - run))
    assert left == 0.0


def test_a_change_of_pace_is_followed_and_standstill_says_nothing():
    pace = Pace()
    for second in range(1, 101):
        pace.left(float(second), second, 2000)
    for second in range(200, 401, 100):  # from now on 100 s for each
        left = pace.left(float(second), 100 + (second - 100) // 100, 2000)
    assert left == pytest.approx(100.0 * (2000 - 103))
    assert Pace().left(0.0, 0, 3) is None
    still = Pace()
    assert [still.left(t, 4, 9) for t in (1.0, 2.0, 50.0)] == [None] * 3


def test_progress_on_a_terminal_is_a_live_bar(capsys, monkeypatch):
    monkeypatch.setattr(console.err, "_force_terminal", True)
    monkeypatch.setenv("TERM", "xterm")
    with console.meter("policy [/x]") as meter:
        meter.update(2, 3, "loss [1]")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "policy [/x]" in captured.err
    assert "2/3" in captured.err
    assert "loss [1]" in captured.err


@pytest.mark.skipif(console.out.is_terminal, reason="standard output is a terminal")
def test_a_wide_table_loses_nothing_in_a_pipe(capsys):
    table = Table(*(f"column {i}" for i in range(20)))
    table.add_row(*(f"12345.{i:03}" for i in range(20)))
    console.out.print(table)
    shown = capsys.readouterr().out
    assert all(f"column {i}" in shown and f"12345.{i:03}" in shown for i in range(20))
