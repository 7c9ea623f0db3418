"""The command line given what it cannot use: one line that names the field and what is accepted."""

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lbw_rl.extras import EXTRAS, extra_of

pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")


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
    "no choice": (
        [*RUN, "--set", "optimizer.name=lion"],
        ["optimizer.name: 'lion'", "'adafactor', 'stable-adamw', 'schedule-free' or 'prodigy'"],
    ),
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
    "compare: what the grid decides": (
        [*COMPARE, "--set", "train.threads=2"],
        ["set: train.threads=2 has no effect in a comparison", "--workers"],
    ),
    "compare: a controller's option for all": (
        [*COMPARE, "--set", "controller.options.kp=5"],
        ["set: controller.options.kp=5 has no effect", "accepted: --controllers pid@controller.options.kp=0.2"],
    ),
    "train-policy: rule": (
        ["train-policy", "--rule", "ppo", "--out", "{}/out"],
        ["rule: 'ppo' is no rule-based controller", "accepted: constant, pid, entropic, lbw-guard"],
    ),
    "compare: an arm of what the grid decides": (
        ["compare", "mini-qwen2", "--controllers", "pid@train.lr_multiplier=3", "--out", "{}/out"],
        ["set: train.lr_multiplier=3 has no effect", "--lr-multipliers sets it"],
    ),
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
    "verify: other schema": (["policy", "verify", "{}/future"], ["policy: ", "feature_schema", "99", "3"]),
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
    "report: nothing": (
        ["report", "{}/absent"],
        ["results: cannot read", "accepted: a results.json, its folder, or a .parquet of rows"],
    ),
    "report: no results": (
        ["report", "{}/used"],
        ["results: cannot read", "accepted: a results.json, its folder, or a .parquet of rows"],
    ),
    "report: garbled": (["report", "{}/garbled-results"], ["results: ", "is not JSON"]),
    "report: other schema": (["report", "{}/other-results"], ["results: ", "schema", "1"]),
    "report: no rows": (["report", "{}/no-rows"], ["results: ", "has no rows; accepted: "]),
    "report: bad row": (["report", "{}/bad-row"], ["results: ", "rows.0.recipe"]),
    "train-policy: no folder": (["train-policy"], ["--out"]),
    "train-policy: no decisions": (
        ["train-policy", "--out", "{}/out", "--decisions", "0"],
        ["--decisions", "--trials", "at least 1"],
    ),
    "train-policy: trials of nothing": (
        ["train-policy", "--out", "{}/out", "--decisions", "0", "--trials", "1000"],
        ["trials=1000", "--rule", "multiples of what a rule proposes"],
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
        f"stress --families mini-qwen2-150 --out {place}/stress": "report",
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
