"""The command line: help, answers, and one line for every bad input."""

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from rich.table import Table

from lbw_rl.cli import console, main
from lbw_rl.cli.app import app
from lbw_rl.extras import EXTRAS, extra_of

pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")

COMMANDS = {
    "demo",
    "train-policy",
    "run",
    "compare",
    "report",
    "replay",
    "policy inspect",
    "policy verify",
    "doctor",
}


class Answer(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> Any:
        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is no JSON")

        assert self.code == 0, self.err
        return json.loads(self.out, parse_constant=refuse)

    def refusal(self) -> str:
        """The one line on standard error of a command that was given something it cannot use."""
        assert (self.code, self.out) == (2, ""), self
        assert self.err.startswith("lbw-rl: ")
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1
        return self.err.removeprefix("lbw-rl: ").rstrip("\n")


@pytest.fixture
def lbw(monkeypatch, capsys):
    """`lbw-rl ARGUMENTS` in this process."""

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["lbw-rl", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Answer(ended.value.code, captured.out, captured.err)

    return call


@pytest.fixture
def small(tiny):
    return [part for setting in tiny for part in ("--set", setting)]


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


# ---- bad input


@pytest.fixture
def place(tmp_path, policy_folder):
    """Things that are not what they should be, by name."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01" * 50)
    (tmp_path / "file").write_text("x")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes.txt").write_text("mine")
    (tmp_path / "no-weights").mkdir()
    (tmp_path / "no-weights/config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "bad.toml").write_text("name = ")
    (tmp_path / "typo.toml").write_text('name = "x"\n[model]\narchitecture = "qwen2"\n[train]\nstepz = 1\n')
    for name in ("tampered", "half", "future"):
        shutil.copytree(policy_folder, tmp_path / name)
    weights = bytearray((tmp_path / "tampered/policy.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "tampered/policy.safetensors").write_bytes(weights)
    (tmp_path / "half/policy.safetensors").unlink()
    header = json.loads((tmp_path / "future/policy.json").read_text())
    (tmp_path / "future/policy.json").write_text(json.dumps({**header, "feature_schema": 99}))
    decision = {"type": "decision", "step": 0, "telemetry": {}, "executed": {"lr_scale": 1.0, "directive": "proceed"}}
    context = {"total_steps": 3, "decide_every": 1, "authority": {}, "seed": 0}
    header = {"type": "header", "schema": 1, "controller": "pid", "context": context}
    ledgers = {
        "garbled": ['{"type": "header"', '{"type": "decision"}'],
        "headless": [json.dumps(decision)],
        "undecided": [json.dumps(header)],
        "old": [json.dumps({**header, "schema": 0})],
        "no-context": [json.dumps({"type": "header", "schema": 1})],
        "no-authority": [json.dumps({**header, "context": {**context, "authority": {"lr_scale": [2, 1]}}})],
        "no-executed": [json.dumps(header), json.dumps({**decision, "executed": None})],
        "unknown-signal": [json.dumps(header), json.dumps({**decision, "telemetry": {"mood": 1.0}})],
    }
    for name, records in ledgers.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in records))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00\n" * 3)
    for name, text in (
        ("garbled-results", "{"),
        ("other-results", '{"schema": 2, "rows": []}'),
        ("no-rows", '{"schema": 1, "rows": []}'),
        ("bad-row", '{"schema": 1, "rows": [{"recipe": 3}]}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(text)
    return tmp_path


RUN = ["run", "mini-qwen2", "--out", "{}/out"]
COMPARE = ["compare", "mini-qwen2", "--controllers", "constant", "--seeds", "1", "--out", "{}/out"]
CONTROLLERS = "accepted: constant, pid, entropic, lbw-guard, ppo"

BAD = {
    "no such command": (["fly"], ["fly"]),
    "no such option": ([*RUN, "--speed", "3"], ["--speed"]),
    "no recipe": (["run"], ["'recipe'"]),
    "unknown recipe": (
        ["run", "mini-qwen3"],
        ["recipe: unknown name 'mini-qwen3'", "did you mean 'mini-qwen2'?", "known: mini-llama"],
    ),
    "recipe file missing": (["run", "{}/absent.toml"], ["recipe: ", "absent.toml' is no readable file", "accepted: "]),
    "recipe no TOML": (["run", "{}/bad.toml"], ["recipe: ", "not a valid TOML file"]),
    "recipe with a typo": (["run", "{}/typo.toml"], ["train.stepz: unknown key", "accepted: train.steps"]),
    "unknown key": ([*RUN, "--set", "no.such.key=1"], ["no.such.key: unknown key", "accepted: name, model, data"]),
    "misspelt key": ([*RUN, "--set", "train.stepz=1"], ["train.stepz: unknown key", "did you mean train.steps?"]),
    "wrong type": (
        [*RUN, "--set", "train.steps=many"],
        ["train.steps: 'many' is not accepted", "should be a valid integer"],
    ),
    "out of range": (
        [*RUN, "--set", "train.steps=0"],
        ["train.steps: 0 is not accepted", "greater than or equal to 1"],
    ),
    "no choice": ([*RUN, "--set", "optimizer.name=lion"], ["optimizer.name: 'lion'", "'adamw', 'sgd' or 'adafactor'"]),
    "no assignment": ([*RUN, "--set", "train.steps"], ["'train.steps'", "accepted form is section.field=value"]),
    "authority": ([*RUN, "--set", "authority.lr_scale=[2.0, 3.0]"], ["authority.lr_scale: ", "0 < low <= 1 <= high"]),
    "unknown controller": ([*RUN, "--controller", "nobody"], ["controller: unknown name 'nobody'", CONTROLLERS]),
    "empty controller": ([*RUN, "--controller", ""], ["controller.name: ''", "at least 1 character"]),
    "controller option": (
        [*RUN, "--controller", "pid", "--set", "controller.options.k=1"],
        ["controller.options.k: pid has no such option", "accepted: signal, setpoint"],
    ),
    "controller value": (
        [*RUN, "--controller", "pid", "--set", "controller.options.kp=-1"],
        ["pid.kp: -1 must be >= 0"],
    ),
    "unknown mode": (
        [*RUN, "--mode", "sideways"],
        ["mode: 'sideways' is unknown", "accepted: off, shadow, skip, lr, govern"],
    ),
    "missing corpus": ([*RUN, "--set", "data.corpus={}/absent.txt"], ["data.corpus: ", "accepted: 'python-docs'"]),
    "empty corpus": ([*RUN, "--set", "data.corpus={}/empty.txt"], ["data.corpus: ", "too little text"]),
    "corpus no text": ([*RUN, "--set", "data.corpus={}/binary.txt"], ["data.corpus: ", "not UTF-8", "accepted: "]),
    "corpus a folder": ([*RUN, "--set", "data.corpus={}/used"], ["data.corpus: ", "is a folder", "accepted: "]),
    "model without weights": (
        [*RUN, "--set", "model.path={}/no-weights"],
        ["model.path: ", "has no weights (*.safetensors)", "accepted: a folder with config.json"],
    ),
    "model without config": (
        [*RUN, "--set", "model.path={}/used"],
        ["model.path: ", "has no config.json", "accepted: "],
    ),
    "model missing": ([*RUN, "--set", "model.path={}/absent"], ["model.path: ", "is no folder", "accepted: "]),
    "folder in use": (
        ["run", "mini-qwen2", "--out", "{}/used"],
        ["out: ", "is not empty; accepted: a new or empty folder"],
    ),
    "folder of something else": (["run", "mini-qwen2", "--out", "{}/used", "--resume"], ["out: ", "no run to resume"]),
    "out is a file": (["run", "mini-qwen2", "--out", "{}/file"], ["out: ", "is a file; accepted: "]),
    "out below a file": (["run", "mini-qwen2", "--out", "{}/file/x"], ["out: ", "cannot be made", "accepted: "]),
    "tampered policy": (
        [*RUN, "--controller", "{}/tampered"],
        ["policy: ", "policy.safetensors has SHA-256", "altered"],
    ),
    "policy without weights": (
        [*RUN, "--controller", "{}/half"],
        ["policy: ", "has no policy.safetensors", "accepted: "],
    ),
    "no policy": ([*RUN, "--controller", "{}/used"], ["policy: ", "has no policy.json", "accepted: "]),
    "run: metrics port": (
        [*RUN, "--metrics-port", "65536"],
        ["metrics-port: 65536 is no TCP port", "accepted: 1 to 65535"],
    ),
    "run: metrics port of zero": ([*RUN, "--metrics-port", "0"], ["metrics-port: 0 is no TCP port"]),
    "run: metrics port of words": ([*RUN, "--metrics-port", "http"], ["--metrics-port", "a valid integer"]),
    "run: metrics address alone": (
        [*RUN, "--metrics-address", "0.0.0.0"],
        ["metrics-address: 0.0.0.0 opens no port", "accepted: together with --metrics-port"],
    ),
    "compare: controller": (["compare", "mini-qwen2", "--controllers", "pid,nobody"], ["controller: ", CONTROLLERS]),
    "compare: twice": (["compare", "mini-qwen2", "--controllers", "pid,pid"], ["controllers: pid, pid", "each once"]),
    "compare: recipe": (["compare", "nobody"], ["recipe: unknown name 'nobody'"]),
    "compare: multiplier": ([*COMPARE, "--lr-multipliers", "1,x"], ["lr-multipliers: 'x'", "accepted: numbers > 0"]),
    "compare: zero": ([*COMPARE, "--lr-multipliers", "0"], ["lr-multipliers: '0'", "accepted: numbers > 0"]),
    "compare: multiplier twice": ([*COMPARE, "--lr-multipliers", "1,1.0"], ["lr-multipliers: 1, 1;", "each once"]),
    "compare: seeds": (["compare", "mini-qwen2", "--seeds", "0"], ["--seeds", "greater than or equal to 1"]),
    "compare: workers": ([*COMPARE, "--workers", "0"], ["--workers", "greater than or equal to 1"]),
    "compare: backend": ([*COMPARE, "--backend", "cloud"], ["backend: 'cloud'", "accepted: local, ray"]),
    "compare: arm": (["compare", "mini-qwen2", "--controllers", "pid@train.stepz=1"], ["train.stepz: unknown key"]),
    "compare: folder in use": (
        ["compare", "mini-qwen2", "--controllers", "pid", "--out", "{}/used"],
        ["out: ", "is not empty"],
    ),
    "compare: corpus": ([*COMPARE, "--set", "data.corpus={}/absent.txt"], ["data.corpus: ", "accepted: "]),
    "verify: nothing": (["policy", "verify", "{}/absent"], ["policy: ", "is not a folder", "accepted: "]),
    "verify: tampered": (
        ["policy", "verify", "{}/tampered"],
        ["policy: ", "policy.safetensors has SHA-256", "altered"],
    ),
    "verify: other schema": (["policy", "verify", "{}/future"], ["policy: ", "feature_schema", "99", "1"]),
    "inspect: tampered": (
        ["policy", "inspect", "{}/tampered"],
        ["policy: ", "policy.safetensors has SHA-256", "altered"],
    ),
    "replay: nothing": (
        ["replay", "{}/absent.jsonl", "--controller", "pid"],
        ["ledger: ", "is not a file; accepted: "],
    ),
    "replay: nobody": (["replay", "{}/garbled.jsonl", "--controller", "nobody"], ["controller: ", CONTROLLERS]),
    "replay: no controller": (["replay", "{}/garbled.jsonl"], ["--controller"]),
    "replay: garbled": (["replay", "{}/garbled.jsonl", "--controller", "pid"], ["ledger: ", "line 1 is not JSON"]),
    "replay: binary": (["replay", "{}/binary.jsonl", "--controller", "pid"], ["ledger: ", "is not text; accepted: "]),
    "replay: empty": (["replay", "{}/empty.txt", "--controller", "pid"], ["ledger: ", "accepted: a ledger.jsonl"]),
    "replay: headless": (["replay", "{}/headless.jsonl", "--controller", "pid"], ["ledger: ", "start with a header"]),
    "replay: undecided": (["replay", "{}/undecided.jsonl", "--controller", "pid"], ["ledger: ", "holds no decision"]),
    "replay: old": (["replay", "{}/old.jsonl", "--controller", "pid"], ["ledger: schema is 0", "reads 1"]),
    "replay: no context": (
        ["replay", "{}/no-context.jsonl", "--controller", "pid"],
        ["ledger: the header", "'context'"],
    ),
    "replay: authority": (
        ["replay", "{}/no-authority.jsonl", "--controller", "pid"],
        ["ledger: the header", "lr_scale"],
    ),
    "replay: decision": (["replay", "{}/no-executed.jsonl", "--controller", "pid"], ["ledger: the decision at step 0"]),
    "replay: signal": (
        ["replay", "{}/unknown-signal.jsonl", "--controller", "pid"],
        ["unknown signal 'mood'", "known: step"],
    ),
    "report: nothing": (["report", "{}/absent"], ["results: cannot read", "accepted: a results.json or its folder"]),
    "report: no results": (["report", "{}/used"], ["results: cannot read", "accepted: a results.json or its folder"]),
    "report: garbled": (["report", "{}/garbled-results"], ["results: ", "is not JSON"]),
    "report: other schema": (["report", "{}/other-results"], ["results: ", "schema", "1"]),
    "report: no rows": (["report", "{}/no-rows"], ["results: ", "has no rows; accepted: "]),
    "report: bad row": (["report", "{}/bad-row"], ["results: ", "rows.0.recipe"]),
    "train-policy: no folder": (["train-policy"], ["--out"]),
    "train-policy: no decisions": (
        ["train-policy", "--out", "{}/out", "--decisions", "0"],
        ["--decisions", "greater than or equal to 1"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_one_line(case, place, lbw, in_process, monkeypatch):
    monkeypatch.chdir(place)
    arguments, parts = BAD[case]
    line = lbw(*(argument.format(place) for argument in arguments)).refusal()
    for part in parts:
        assert part in line, line
    assert len(line) < 800
    assert not (place / "out").exists() or not any((place / "out").iterdir())  # the corrected command can use it
    assert [p.name for p in (place / "used").iterdir()] == ["notes.txt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_absent_device(lbw, tmp_path):
    line = lbw("run", "mini-qwen2", "--set", "train.device=cuda", "--out", tmp_path / "out").refusal()
    assert line == "train.device: 'cuda' is not available here; accepted: 'auto', 'cpu'"


def test_metrics_whose_port_is_in_use_cost_a_warning_and_not_the_run(lbw, small, tmp_path, caplog):
    pytest.importorskip("prometheus_client")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        answer = lbw("run", "mini-qwen2", *small, "--metrics-port", port, "--out", tmp_path / "out", "--json")
    assert answer.json()["steps"] == 6
    assert answer.json()["governor"]["faults"] == {"prometheus": 1}
    assert f"there are no metrics, 127.0.0.1:{port} cannot be listened on: Address already in use" in caplog.text


def test_a_run_has_no_metrics_and_no_event_files_unless_asked(lbw, small, tmp_path):
    pytest.importorskip("tensorboard")
    assert lbw("run", "mini-qwen2", *small, "--out", tmp_path / "plain").code == 0
    assert lbw("run", "mini-qwen2", *small, "--tensorboard", "--out", tmp_path / "asked").code == 0
    names = [{p.name for p in (tmp_path / folder).iterdir()} for folder in ("plain", "asked")]
    assert names[1] - names[0] == {"tensorboard"}
    assert len(list((tmp_path / "asked/tensorboard").iterdir())) == 1


@pytest.mark.parametrize(
    ("module", "option"), [("prometheus_client", ["--metrics-port", "9464"]), ("tensorboard", ["--tensorboard"])]
)
def test_metrics_without_their_packages_are_refused_before_the_run(lbw, tmp_path, monkeypatch, module, option):
    monkeypatch.setitem(sys.modules, module, None)
    line = lbw("run", "mini-qwen2", *option, "--out", tmp_path / "out").refusal()
    assert line == f"{module.replace('_', '-')} is not installed; accepted: pip install 'lbw-rl[metrics]'"
    assert not (tmp_path / "out").exists()


def test_what_is_no_bad_input_keeps_its_traceback(lbw, monkeypatch):
    monkeypatch.setattr("lbw_rl.doctor.examine", lambda: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        lbw("doctor")


def test_an_optional_package_that_is_missing_names_its_extra(lbw, monkeypatch, tmp_path):
    def examine() -> None:
        raise ModuleNotFoundError("No module named 'stable_baselines3'", name="stable_baselines3.common")

    monkeypatch.setattr("lbw_rl.doctor.examine", examine)
    line = lbw("doctor").refusal()
    assert line == "stable_baselines3 is not installed; accepted: pip install 'lbw-rl[rl]'"
    monkeypatch.setitem(sys.modules, "transformers", None)
    line = lbw("run", "mini-qwen2", "--out", tmp_path / "out").refusal()
    assert line.endswith("needs transformers: pip install 'lbw-rl[hf]'")


CORE_ONLY = """
import sys
from lbw_rl.extras import EXTRAS
for package in (p for packages in EXTRAS.values() for p in packages):
    sys.modules[package.replace("-", "_")] = None  # as if it were not installed
from lbw_rl.cli import main
for line in sys.stdin.read().splitlines():
    sys.argv = ["lbw-rl", *line.split()]
    try:
        main()
    except SystemExit as ended:
        print("exit", ended.code, flush=True)
        print("--", file=sys.stderr, flush=True)
"""


def test_with_the_core_alone_every_command_works_or_names_its_extra(policy_folder, place):
    expected = {
        "doctor": None,
        f"policy verify {policy_folder}": None,
        f"policy inspect {policy_folder}": None,
        f"run mini-qwen2 --out {place}/run": "hf",
        f"compare mini-qwen2 --out {place}/compare": "report",
        f"report {place}/used": "report",
        f"train-policy --out {place}/policy": "rl",
        f"demo --out {place}/demo": "rl",
    }
    done = subprocess.run(
        [sys.executable, "-c", CORE_ONLY], input="\n".join(expected), capture_output=True, text=True, cwd=place
    )
    assert done.returncode == 0, done.stderr
    codes = re.findall(r"^exit (\d+)$", done.stdout, re.MULTILINE)
    assert codes == ["2" if extra else "0" for extra in expected.values()], done.stderr
    for said, extra in zip(done.stderr.split("--\n"), expected.values()):
        assert re.fullmatch(rf"lbw-rl: .*pip install 'lbw-rl\[{extra}\]'\n" if extra else "", said), said


def test_every_extra_is_one_of_the_distributions():
    import tomllib

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        assert sorted(packages) == sorted(re.split("[<>=]", p)[0] for p in declared[extra])
    assert extra_of("prometheus_client.core") == "metrics"
    assert extra_of("json") is None
    assert extra_of(None) is None


def test_an_interrupt_says_how_to_go_on(lbw, monkeypatch, tmp_path):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lbw_rl.training_runs.run.run", interrupted)
    answer = lbw("run", "mini-qwen2", "--out", tmp_path)
    assert tuple(answer) == (130, "", "lbw-rl: interrupted; the same command with --resume goes on where it stopped\n")


def test_a_reader_that_leaves_is_no_error(policy_folder):
    command = [sys.executable, "-c", "from lbw_rl.cli import main; main()", "policy", "inspect", str(policy_folder)]
    for form in ([], ["--json"]):
        process = subprocess.Popen([*command, *form], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.close()
        assert process.stderr.read() == ""
        process.stderr.close()
        assert process.wait() == 1


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
    assert re.fullmatch(r"mini-qwen2 · pid: 6/6 loss \d\.\d{3}\n", answer.err)

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
    assert re.fullmatch(r"comparing on mini-qwen2: 18/18 \S+ ×\S+: \d\.\d{3}\n", answer.err)
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
    assert re.fullmatch(r"mini-qwen2 · constant: 6/6 loss \d\.\d{3}\n", done.stderr)


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
    assert captured.err.splitlines() == ["training: 10/30 loss 10", "training: 20/30 loss 20", "training: 30/30"]


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
