"""One governed run: what it writes, how it ends, and that a kill changes nothing."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lbw_rl import SIGNALS
from lbw_rl.envs.recipe import Recipe, load_recipe, override
from lbw_rl.ledger import truncate_jsonl
from lbw_rl.registry import load_controller
from lbw_rl.training_runs.folders import prepare_output, read_jsonl
from lbw_rl.training_runs.results import Row
from lbw_rl.training_runs.run import run

safetensors_torch = pytest.importorskip("safetensors.torch")
pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")

WALL_CLOCK = {name for name, signal in SIGNALS.items() if signal.source in ("clock", "device")}
ACTION = {"lr_scale", "momentum_scale", "directive"}


@pytest.fixture
def recipe(tiny):
    def make(*overrides: str) -> Recipe:
        return override(load_recipe("mini-qwen2"), [*tiny, *overrides])

    return make


def strictly(text: str) -> Any:
    """JSON as other languages read it: without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def lines(path: Path) -> list[dict[str, Any]]:
    return [strictly(line) for line in path.read_text().splitlines()]


def timeless(folder: Path) -> dict[str, Any]:
    """All that a finished run left, without what a clock or the machine's load decides."""
    summary = strictly((folder / "summary.json").read_text())
    for record in (summary, summary["governor"]):
        for key in ("seconds", "overhead_seconds"):
            record.pop(key, None)
    metrics = lines(folder / "metrics.jsonl")
    ledger = lines(folder / "ledger.jsonl")
    for record in metrics:
        del record["seconds"]
    for record in ledger[1:]:
        for name in WALL_CLOCK:
            del record["telemetry"][name]
    return {"summary": summary, "metrics": metrics, "ledger": ledger}


def same_weights(a: Path, b: Path) -> bool:
    first, second = (safetensors_torch.load_file(folder / "model/model.safetensors") for folder in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# ---- what a run writes


def test_what_a_run_leaves(recipe, tmp_path):
    seen = []
    summary = run(
        recipe("controller.name=pid", "optimizer.grad_clip=0.5", "train.checkpoint_every=0"),
        tmp_path / "out",
        progress=lambda done, total, loss: seen.append((done, total, loss)),
    )
    folder = tmp_path / "out"
    assert sorted(p.name for p in folder.iterdir()) == ["ledger.jsonl", "metrics.jsonl", "recipe.json", "summary.json"]
    assert strictly((folder / "summary.json").read_text()) == summary

    contract = (
        "recipe optimizer controller lr_multiplier base_lr seed final_loss final_ppl initial_loss diverged steps "
        "seconds overhead_seconds skips rollbacks steps_to_target"
    )
    assert set(contract.split()) <= set(summary)
    assert set(Row.model_fields) - {"arm", "folder"} <= set(summary)
    assert (summary["recipe"], summary["controller"], summary["mode"]) == ("mini-qwen2", "pid", "govern")
    assert summary["optimizer"] == "adamw+clip0.5"
    assert (summary["steps"], summary["seed"], summary["lr_multiplier"]) == (6, 0, 1.0)
    assert summary["initial_loss"] == pytest.approx(math.log(300), abs=0.3)
    assert summary["final_loss"] < summary["initial_loss"]
    assert summary["final_ppl"] == pytest.approx(math.exp(summary["final_loss"]))
    assert not summary["diverged"]
    assert 0 < summary["overhead_seconds"] < summary["seconds"]
    assert summary["governor"]["decisions"] == 6
    assert sum(summary["governor"]["regimes"].values()) == 6
    assert len(summary["corpus_sha256"]) == 64

    metrics = lines(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(6))
    assert all(set(m) == {"step", "loss", "eval_loss", "lr", "seconds"} for m in metrics)
    assert [m["eval_loss"] is not None for m in metrics] == [False, False, True, False, False, True]
    assert metrics[-1]["eval_loss"] == summary["final_loss"]
    assert [m["seconds"] for m in metrics] == sorted(m["seconds"] for m in metrics)

    header, *decisions = lines(folder / "ledger.jsonl")
    assert (header["type"], header["controller"], header["mode"], header["schema"]) == ("header", "pid", "govern", 1)
    assert header["context"]["total_steps"] == 6
    assert [d["step"] for d in decisions] == list(range(6))
    for decision, metric in zip(decisions, metrics, strict=True):
        assert set(decision["telemetry"]) == set(SIGNALS)
        assert set(decision["executed"]) == set(decision["proposed"]) == ACTION
        assert {"regime", "evidence", "reasons"} <= set(decision)
        assert decision["telemetry"]["loss"] == pytest.approx(metric["loss"])
        assert metric["lr"] == pytest.approx(decision["telemetry"]["learning_rate"] * decision["executed"]["lr_scale"])
    assert seen == [(m["step"] + 1, 6, m["loss"]) for m in metrics]


def test_the_gradient_norm_in_the_ledger_is_the_one_before_clipping(recipe, tmp_path):
    run(recipe(), tmp_path / "free")
    run(recipe("optimizer.grad_clip=1e-3"), tmp_path / "clipped")
    free, clipped = (lines(tmp_path / name / "ledger.jsonl")[1] for name in ("free", "clipped"))
    assert clipped["telemetry"]["grad_norm"] == pytest.approx(free["telemetry"]["grad_norm"], rel=1e-5)
    assert clipped["telemetry"]["grad_norm"] > 1e-3


def test_shadow_and_off_train_as_the_optimizer_alone(recipe, tmp_path):
    settings = ["train.lr_multiplier=30", "train.checkpoint_every=5"]
    run(recipe("controller.name=constant", *settings), tmp_path / "constant")
    for mode in ("shadow", "off"):
        summary = run(recipe("controller.name=lbw-guard", *settings), tmp_path / mode, mode=mode)
        assert same_weights(tmp_path / mode, tmp_path / "constant")
        assert summary["mode"] == mode
    assert not (tmp_path / "off/ledger.jsonl").exists()
    _, *decisions = lines(tmp_path / "shadow/ledger.jsonl")
    assert all(d["executed"] == {"lr_scale": 1.0, "momentum_scale": 1.0, "directive": "proceed"} for d in decisions)
    assert any(d["would_execute"]["lr_scale"] != 1.0 for d in decisions)


# ---- divergence


@pytest.mark.parametrize("multiplier", [1e3, 1e4])
def test_a_diverged_run_keeps_its_row_capped_and_flagged(multiplier, recipe, tmp_path):
    summary = run(recipe(f"train.lr_multiplier={multiplier}", "train.steps=12"), tmp_path / "out")
    assert summary["diverged"] is True
    assert summary["final_loss"] == summary["initial_loss"]
    assert summary["final_ppl"] == pytest.approx(math.exp(summary["initial_loss"]))
    assert summary["final_loss_uncapped"] is None or summary["final_loss_uncapped"] > summary["initial_loss"]
    assert summary["steps"] == 12


def test_a_run_full_of_nan_ends_in_valid_json(recipe, tmp_path):
    settings = ["optimizer.name=sgd", "train.lr_multiplier=1e30", "schedule.name=constant", "train.checkpoint_every=4"]
    summary = run(recipe("controller.name=lbw-guard", *settings), tmp_path / "out")
    assert summary["diverged"]
    assert summary["final_loss"] == summary["initial_loss"]
    assert summary["final_loss_uncapped"] is None
    assert strictly((tmp_path / "out/summary.json").read_text()) == summary
    assert lines(tmp_path / "out/metrics.jsonl")[-1]["loss"] is None
    assert lines(tmp_path / "out/ledger.jsonl")[-1]["telemetry"]["loss"] is None


def test_a_model_that_is_broken_before_training_is_refused(recipe, tmp_path):
    from lbw_rl.envs.task import TrainingTask

    task = TrainingTask(recipe())
    with torch.no_grad():
        next(task.model.parameters()).fill_(math.nan)
    task.save_pretrained(tmp_path / "model")
    broken = recipe(f"model.path={tmp_path / 'model'}", "data.tokenizer=model")
    with pytest.raises(ValueError, match=r"^model: the held-out loss before training is nan; accepted: "):
        run(broken, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_entropy_control_of_each_tensor_in_a_real_run(recipe, tmp_path):
    """One group per tensor; those 20 % under their own target get 15 % more, and the norms' gains keep theirs."""
    micro = ["controller.name=entropic", "controller.options.micro=true", "controller.options.target=0.9"]
    summary = run(recipe(*micro, "optimizer.per_tensor=true", "train.steps=12"), tmp_path / "out")
    assert summary["governor"]["faults"] == {}
    ledger = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    groups = ledger[0]["context"]["groups"]
    seen = set()
    for record in ledger[1:]:
        entropies, scales = record["telemetry"]["group_grad_entropy"], record["executed"]["group_lr_scales"]
        assert len(entropies) == len(scales) == len(groups) > 10
        for name, entropy, scale in zip(groups, entropies, scales, strict=True):
            assert scale == pytest.approx(1.15) or scale == 1.0
            seen.add((entropy is None, "norm" in name or "bias" in name, scale > 1.0))
    assert (False, False, True) in seen  # a matrix that was helped
    assert (False, False, False) in seen  # and one that was not
    assert not [s for s in seen if s[0] != s[1]]  # measured are the matrices, and they alone


# ---- resuming

LONG = ["train.steps=20", "train.checkpoint_every=5", "train.lr_multiplier=30", "optimizer.grad_clip=1.0"]

KILLED = """
import json, os, signal, sys
import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM  # once, not in every child
from lbw_rl.envs.recipe import recipe_from_dict
from lbw_rl.ledger import Ledger
from lbw_rl.training_runs.run import run

torch.set_num_threads(1)
recipe, out = recipe_from_dict(json.loads(sys.argv[1])), sys.argv[2]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def before_the_first_checkpoint():
    run(recipe, out, resume=True, progress=lambda done, *_: die() if done == 3 else None)

def in_the_middle_of_a_ledger_line():
    write = Ledger.write
    def torn(self, kind, record):
        if record.get("step") == 8:
            with self.path.open("ab", buffering=0) as file:
                file.write(b'{"type":"decision","step":8,"telem')
            die()
        write(self, kind, record)
    Ledger.write = torn
    run(recipe, out, resume=True)

def in_the_middle_of_a_checkpoint():
    save = torch.save
    def torn(content, file):
        if content["step"] == 15:
            file.write(b"half a checkpoint")
            file.flush()
            die()
        save(content, file)
    torch.save = torn
    run(recipe, out, resume=True)

def between_training_and_summary():
    import lbw_rl.training_runs.run as module
    module._summarise = lambda *_: die()
    run(recipe, out, resume=True)

# A fork of a process in which torch has not computed yet: one import for all of them.
for attempt in (
    before_the_first_checkpoint,
    in_the_middle_of_a_ledger_line,
    in_the_middle_of_a_checkpoint,
    between_training_and_summary,
):
    child = os.fork()
    if child == 0:
        try:
            attempt()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    print(attempt.__name__, "killed" if os.WIFSIGNALED(status) else f"exit {status}", os.path.exists(out + "/summary.json"))
"""


ENTROPIC = [
    *("controller.name=entropic", "controller.options.target=auto", "controller.options.warmup=4"),
    *("controller.options.half_life=10", "controller.options.recalibrate=6", "controller.options.band=[0.8, 1.2]"),
    *("controller.options.micro=true", "optimizer.per_tensor=true", "authority.max_rollbacks=2"),
]
"""All that EntroPIC can remember: record, targets of the whole and of each tensor, integral, safe mode, snapshots."""


@pytest.mark.parametrize("governor", [["controller.name=lbw-guard"], ENTROPIC], ids=["lbw-guard", "entropic"])
def test_a_run_killed_at_any_point_equals_the_uninterrupted_one(recipe, tmp_path, governor):
    chosen = recipe(*governor, *LONG)
    script = [sys.executable, "-c", KILLED, json.dumps(chosen.model_dump(mode="json")), str(tmp_path / "killed")]
    killed = subprocess.run(script, capture_output=True, text=True, check=False)
    assert [line.split()[1:] for line in killed.stdout.splitlines()] == [["killed", "False"]] * 4, killed.stderr

    resumed = run(chosen, tmp_path / "killed", resume=True)
    straight = run(chosen, tmp_path / "straight")
    assert same_weights(tmp_path / "killed", tmp_path / "straight")
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "straight")
    assert resumed["final_loss"] == straight["final_loss"]
    assert straight["governor"]["interventions"] > 0  # there was something to get wrong
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == [
        "ledger.jsonl",
        "metrics.jsonl",
        "model",
        "recipe.json",
        "summary.json",
    ]


class Interruption(Exception):
    pass


@pytest.mark.parametrize("name", ["constant", "pid", "entropic", "lbw-guard", "random", "policy", "slow policy"])
def test_every_controller_resumes_where_it_stopped(name, recipe, tmp_path, deviceless_policy):
    folder = {"policy": deviceless_policy(1), "slow policy": deviceless_policy(3)}.get(name)
    chosen = recipe(f"controller.name={folder or name}", *LONG, "train.accumulation=2", "authority.max_rollbacks=3")

    def interrupt(done: int, total: int, loss: float) -> None:
        if done in (7, 11):
            raise Interruption

    for resume in (False, True):
        with pytest.raises(Interruption):
            run(chosen, tmp_path / "resumed", resume=resume, progress=interrupt)
    run(chosen, tmp_path / "resumed", resume=True)
    run(chosen, tmp_path / "straight")
    assert same_weights(tmp_path / "resumed", tmp_path / "straight")
    assert timeless(tmp_path / "resumed") == timeless(tmp_path / "straight")


@pytest.fixture
def deviceless_policy(tmp_path, policy_folder):
    """Makes frozen policies that do not look at the load of the machine."""
    import numpy as np

    from lbw_rl import FEATURES
    from lbw_rl.policy import load_policy, save_policy

    def make(decide_every: int) -> Path:
        policy = load_policy(policy_folder)
        (weight, bias), *rest = policy.layers
        device = [i for i, name in enumerate(FEATURES) if name.startswith("gpu_")]
        weight = weight.copy()
        weight[:, device] = 0.0
        std = np.ones(len(FEATURES))
        std[device] = 100.0  # nor does a busy machine make it hand over to the rule
        return save_policy(
            tmp_path / f"policy-{decide_every}",
            [(weight, bias), *rest],
            mean=np.zeros(len(FEATURES)),
            std=std,
            authority=policy.header.authority,
            decide_every=decide_every,
            provenance={"seed": 0},
            card="# Test",
        )

    return make


def test_a_finished_run_is_returned_as_it_is(recipe, tmp_path, monkeypatch):
    first = run(recipe(), tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    monkeypatch.setattr("lbw_rl.training_runs.run.TrainingTask", lambda *_: pytest.fail("it trained again"))
    assert run(recipe(), tmp_path, resume=True) == first
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


def test_a_finished_run_on_another_text_is_refused(recipe, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 400)
    settings = [f"data.corpus={text}", "data.vocab_size=300"]
    first = run(recipe(*settings), tmp_path / "run")
    assert run(recipe(*settings), tmp_path / "run", resume=True) == first
    text.write_text("whether 'tis nobler in the mind to suffer. " * 400)
    assert "was trained on another text" in refusal(recipe(*settings), tmp_path / "run", resume=True)


@pytest.mark.parametrize("finished", [True, False])
def test_another_policy_under_the_same_name_is_refused(finished, recipe, tmp_path, policy_folder):
    folder = tmp_path / "policy"
    shutil.copytree(policy_folder, folder)
    settings = [f"controller.name={folder}", "train.checkpoint_every=2"]

    def interrupt(done: int, *_: Any) -> None:
        if not finished and done == 3:
            raise Interruption

    with contextlib.nullcontext() if finished else pytest.raises(Interruption):
        run(recipe(*settings), tmp_path / "run", progress=interrupt)
    header = json.loads((folder / "policy.json").read_text())
    header["fallback"]["window"] += 1  # the weights are the same, what it does is not
    (folder / "policy.json").write_text(json.dumps(header))
    assert "another policy" in refusal(recipe(*settings), tmp_path / "run", resume=True)


def test_the_kill_signal_never_ends_a_run_that_nothing_governs(recipe, tmp_path):
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        killed = run(
            recipe(),
            tmp_path,
            mode="off",
            kill_signal=signal.SIGUSR1,
            progress=lambda done, *_: os.kill(os.getpid(), signal.SIGUSR1),
        )
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert killed["mode"] == "off"


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(ValueError) as caught:
        run(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("state", ["finished", "checkpointed", "no checkpoint yet"])
def test_another_recipe_is_refused(state, recipe, tmp_path):
    settings = ["train.checkpoint_every=2"]
    if state == "finished":
        run(recipe(*settings), tmp_path)
    else:

        def interrupt(done: int, *_: Any) -> None:
            if done == (3 if state == "checkpointed" else 1):
                raise Interruption

        with pytest.raises(Interruption):
            run(recipe(*settings), tmp_path, progress=interrupt)
    assert (tmp_path / "checkpoints").exists() == (state == "checkpointed")
    other = recipe(*settings, "train.seed=1", "controller.name=pid", "controller.options.kp=0.2")
    message = refusal(other, tmp_path, resume=True)
    assert "differs in controller.name, controller.options.kp, train.seed)" in message
    assert "accepted: the same recipe" in message


def test_another_mode_is_refused(recipe, tmp_path):
    run(recipe(), tmp_path)
    message = refusal(recipe(), tmp_path, resume=True, mode="shadow")
    assert message == f"mode: {tmp_path} was started with 'govern'; accepted: the same mode, or a new --out"


def test_a_bad_mode_or_controller_leaves_nothing_behind(recipe, tmp_path):
    out = tmp_path / "out"
    assert (
        refusal(recipe(), out, mode="sideways")
        == "mode: 'sideways' is unknown; accepted: off, shadow, skip, lr, govern"
    )
    assert refusal(recipe("controller.name=nobody"), out).startswith("controller: unknown name 'nobody'; accepted: ")
    assert (
        refusal(recipe("controller.name=pid", "controller.options.kp=-1"), out) == "pid.kp: -1 must be >= 0 and finite"
    )
    assert "controller.options" in refusal(recipe("controller.name=pid", "controller.options.nope=1"), out)
    assert not out.exists()


def test_only_a_run_can_be_resumed(recipe, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("somebody else's")
    assert "is not empty; accepted: a new or empty folder, or --resume" in refusal(recipe(), tmp_path)
    assert "holds files but no run to resume" in refusal(recipe(), tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == "somebody else's"


def test_another_corpus_under_the_same_name_is_refused(recipe, tmp_path):
    corpus = tmp_path / "corpus.txt"
    text = Path(recipe().data.corpus).read_text(encoding="utf-8")
    corpus.write_text(text, encoding="utf-8")
    chosen = recipe(f"data.corpus={corpus}", "train.checkpoint_every=2")

    def interrupt(done: int, *_: Any) -> None:
        if done == 4:
            raise Interruption

    with pytest.raises(Interruption):
        run(chosen, tmp_path / "out", progress=interrupt)
    corpus.write_text(text.replace("a", "e"), encoding="utf-8")
    assert refusal(chosen, tmp_path / "out", resume=True).startswith("checkpoint: was trained on a corpus of sha256")


def test_a_controller_object_governs_instead_of_the_recipes(recipe, tmp_path):
    controller = load_controller("pid", ki=0.5)
    run(recipe(), tmp_path, controller=controller)
    assert lines(tmp_path / "ledger.jsonl")[0]["controller"] == "pid"


# ---- folders


def test_output_folders(tmp_path):
    assert prepare_output(tmp_path / "new/deep", resume=False).is_dir()
    file = tmp_path / "file"
    file.write_text("")
    for place, reason in ((file, "is a file"), (file / "below", "cannot be made"), (tmp_path, "is not empty")):
        with pytest.raises(ValueError, match=rf"^out: .* {reason}.*; accepted: "):
            prepare_output(place, resume=False)
    assert prepare_output(tmp_path, resume=True) == tmp_path


def test_a_torn_line_ends_a_jsonl_file(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"type":"header"}\n' + "".join(f'{{"step":{i}}}\n' for i in range(4)) + '{"step":4,"lo')
    assert [r.get("step") for r in read_jsonl(path)] == [None, 0, 1, 2, 3]
    truncate_jsonl(path, 2)
    assert path.read_text() == '{"type":"header"}\n{"step":0}\n{"step":1}\n'
    assert list(read_jsonl(tmp_path / "absent")) == []
