"""Runs and their checkpoints: what a resume starts from is good, and no fault of the disk ends a run."""

import json
import math
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import flip_a_byte, names, steps, warnings

from lbw_rl import Action
from lbw_rl.controller import Controller
from lbw_rl.envs.recipe import Recipe, load_recipe, override
from lbw_rl.envs.task import TrainingTask
from lbw_rl.last_good import HEALTHY_REGIMES
from lbw_rl.training_runs.checkpoints import Checkpoints
from lbw_rl.training_runs.folders import JsonLines, write_json
from lbw_rl.training_runs.health import ALARMS
from lbw_rl.training_runs.run import run


@pytest.fixture
def _hf() -> None:
    pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")


@pytest.fixture
def recipe(tiny, _hf) -> Any:
    def make(*overrides: str) -> Recipe:
        settings = [*tiny, "train.steps=12", "train.checkpoint_every=4", "train.measure_device=false"]
        return override(load_recipe("mini-qwen2"), [*settings, *overrides])

    return make


@pytest.fixture
def saved(monkeypatch) -> list[int]:
    """The steps at which checkpoints are committed, as they come."""
    seen: list[int] = []
    save = Checkpoints.save

    def spy(self: Checkpoints, step: int, state: Any) -> bool:
        done = save(self, step, state)
        if done:
            seen.append(step)
        return done

    monkeypatch.setattr(Checkpoints, "save", spy)
    return seen


class Interruption(Exception):
    pass


def interrupt_at(step: int) -> Any:
    def progress(done: int, *_: Any) -> None:
        if done == step:
            raise Interruption

    return progress


def interrupted(recipe: Recipe, out: Path, at: int, **kwargs: Any) -> Path:
    """Runs up to a step and returns the folder of its checkpoints."""
    with pytest.raises(Interruption):
        run(recipe, out, progress=interrupt_at(at), **kwargs)
    return out / "checkpoints"


def outcome(out: Path) -> tuple[bytes, bytes, list[dict[str, Any]], dict[str, Any]]:
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    for record in (*metrics, summary, summary["governor"]):
        for key in ("seconds", "overhead_seconds"):
            record.pop(key, None)
    model, ledger = (out / "model/model.safetensors").read_bytes(), (out / "ledger.jsonl").read_bytes()
    return model, ledger, metrics, summary


def test_without_clock_and_device_two_runs_leave_the_same_files(recipe, tmp_path, saved):
    for name in "ab":
        run(recipe("controller.name=lbw-guard"), tmp_path / name)
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
    assert saved == [4, 8, 4, 8]
    assert outcome(tmp_path / "a")[3]["checkpoint_failures"] == 0


@pytest.mark.parametrize("bad", [1, 2])
def test_a_resume_from_an_older_checkpoint_or_from_none_loses_nothing(bad, recipe, tmp_path, caplog, saved):
    chosen = recipe("controller.name=lbw-guard")
    folder = interrupted(chosen, tmp_path / "out", 10)
    assert steps(folder) == [4, 8]
    for name in names(folder)[-bad:]:
        flip_a_byte(folder / name)
    run(chosen, tmp_path / "out", resume=True)
    instead = "step-00000004-" if bad == 1 else "none that is good is left, the run starts from the beginning"
    assert len(warnings(caplog)) == bad
    assert all(f"; {instead}" in line for line in warnings(caplog))
    assert saved == ([4, 8, 8] if bad == 1 else [4, 8, 4, 8])
    run(chosen, tmp_path / "straight")
    assert outcome(tmp_path / "out") == outcome(tmp_path / "straight")


LEDGER_DAMAGE = {
    "gone": (lambda path: path.unlink(), 0),
    "empty": (lambda path: os.truncate(path, 0), 0),
    "header torn": (lambda path: path.write_bytes(path.read_bytes()[9:]), 8),
    "short": (lambda path: path.write_text("".join(path.read_text().splitlines(keepends=True)[:4])), 3),
}


@pytest.mark.parametrize("damage", LEDGER_DAMAGE)
def test_a_resume_survives_a_ledger_that_the_disk_lost(damage, recipe, tmp_path, caplog):
    chosen = recipe("controller.name=lbw-guard")
    interrupted(chosen, tmp_path / "out", 10)
    spoil, left = LEDGER_DAMAGE[damage]
    spoil(tmp_path / "out/ledger.jsonl")
    (tmp_path / "out/metrics.jsonl").unlink()
    run(chosen, tmp_path / "out", resume=True)
    lost = {"metrics.jsonl": 0, "ledger.jsonl": left}
    assert warnings(caplog) == [
        f"{name} holds {count} of the 8 lines written before step 8: the disk lost the rest, the run goes on"
        for name, count in lost.items()
        if count < 8
    ]
    run(chosen, tmp_path / "straight")
    model, ledger, metrics, _ = outcome(tmp_path / "out")
    straight, whole, all_metrics, _ = outcome(tmp_path / "straight")
    assert model == straight
    expected = whole.splitlines()
    assert ledger.splitlines() == [*expected[: 1 + left], *expected[9:]]
    assert metrics == all_metrics[8:]


def test_a_run_whose_mode_was_changed_on_the_way_resumes_under_the_one_it_was_started_with(
    recipe, tmp_path, monkeypatch
):
    from lbw_rl import Governor

    observe = Governor.observe

    def switched(self: Governor, *args: Any, **kwargs: Any) -> None:
        if self.step in (5, 8):
            self.set_mode("shadow")
        observe(self, *args, **kwargs)

    monkeypatch.setattr(Governor, "observe", switched)
    interrupted(recipe(), tmp_path, 10)
    summary = run(recipe(), tmp_path, resume=True)
    assert (summary["mode"], summary["governor"]["mode"]) == ("govern", "shadow")
    assert run(recipe(), tmp_path, resume=True) == summary


def test_lines_are_on_disk_before_their_checkpoint(recipe, tmp_path, monkeypatch):
    events: list[str] = []
    sync, save = JsonLines.sync, Checkpoints.save
    monkeypatch.setattr(JsonLines, "sync", lambda self: (events.append("metrics"), sync(self))[1])
    monkeypatch.setattr(Checkpoints, "save", lambda self, *a: (events.append("checkpoint"), save(self, *a))[1])
    from lbw_rl import Governor

    flush = Governor.flush
    monkeypatch.setattr(Governor, "flush", lambda self: (events.append("ledger"), flush(self))[1])
    run(recipe(), tmp_path / "out")
    assert events == ["metrics", "ledger", "checkpoint"] * 2 + ["metrics", "ledger"]


def test_a_full_disk_does_not_end_a_run(recipe, tmp_path, caplog, saved):
    size = 8000  # less than a checkpoint, and soon less than the ledger
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def progress(done: int, total: int, loss: float) -> None:
        full = 2 <= done < 11  # someone makes room in time for the model
        resource.setrlimit(resource.RLIMIT_FSIZE, (size if full else limits[0], limits[1]))

    try:
        summary = run(recipe("train.checkpoint_every=3"), tmp_path / "out", progress=progress)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved == []
    assert summary["checkpoint_failures"] == 3
    assert summary["steps"] == 12
    assert [line for line in warnings(caplog) if "checkpoint" in line] == [
        "the checkpoint of step 3 was not written, the run goes on without it: File too large"
    ]


# ---- the health gate


def test_a_state_with_a_nan_loss_is_not_kept(recipe, tmp_path, monkeypatch, caplog, saved):
    backward = TrainingTask.backward

    def poisoned(self: TrainingTask) -> Any:
        loss, norm = backward(self)
        return (loss * math.nan if self.step in (3, 4) else loss), norm

    monkeypatch.setattr(TrainingTask, "backward", poisoned)
    run(recipe(), tmp_path / "out")
    assert saved == [6, 8]
    assert warnings(caplog) == [
        "the checkpoint of step 4 is put off to the next healthy step: the training loss is nan"
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_state_with_a_weight_that_is_not_finite_is_not_kept(value, recipe, tmp_path, monkeypatch, caplog, saved):
    advance, backward = TrainingTask.advance, TrainingTask.backward
    whole: list[torch.Tensor] = []

    @torch.no_grad()
    def poisoned(self: TrainingTask) -> None:
        advance(self)
        if self.step == 8:
            weight = next(self.model.parameters())
            whole.append(weight.clone())
            weight[1, 2] = value

    def healed(self: TrainingTask) -> Any:
        with torch.no_grad():
            for weight in whole:
                next(self.model.parameters()).copy_(weight)
        whole.clear()
        return backward(self)

    monkeypatch.setattr(TrainingTask, "advance", poisoned)
    monkeypatch.setattr(TrainingTask, "backward", healed)
    run(recipe(), tmp_path / "out")
    assert saved == [4, 9]
    assert warnings(caplog) == ["the checkpoint of step 8 is put off to the next healthy step: a weight is not finite"]


class Alarmist(Controller):
    """Names the regimes that it is given, step after step."""

    name = "alarmist"

    def __init__(self, *regimes: str) -> None:
        self.regimes = list(regimes)

    def reset(self, context: Any) -> None:
        pass

    def act(self, telemetry: Any) -> Action:
        return Action(regime=self.regimes[int(telemetry.step)])


@pytest.mark.parametrize("alarm", sorted(ALARMS))
@pytest.mark.parametrize("mode", ["govern", "shadow", "off"])
def test_a_state_under_an_alarm_is_not_kept(alarm, mode, recipe, tmp_path, caplog, saved):
    regimes = ["steady"] * 3 + [alarm] * 5 + ["steady"] * 2 + [alarm] * 2
    run(recipe(), tmp_path / "out", controller=Alarmist(*regimes), mode=mode)
    if mode == "off":  # nobody rules
        assert (saved, warnings(caplog)) == ([4, 8], [])
        return
    assert saved == [9]  # once for the two that were due
    assert warnings(caplog) == [
        f"the checkpoint of step 4 is put off to the next healthy step: the controller sees '{alarm}'"
    ]


@pytest.mark.parametrize("regime", [*sorted(HEALTHY_REGIMES), "unknown", "my own word", "fault", "suspended", ""])
def test_other_regimes_do_not_keep_a_run_from_its_checkpoints(regime, recipe, tmp_path, caplog, saved):
    run(recipe(), tmp_path / "out", controller=Alarmist(*[regime] * 12))
    assert (saved, warnings(caplog)) == ([4, 8], [])


def test_a_broken_controller_does_not_keep_a_run_from_its_checkpoints(recipe, tmp_path, saved):
    run(recipe(), tmp_path / "out", controller=Alarmist())
    assert saved == [4, 8]


def test_the_alarms_are_those_of_the_shipped_rules():
    from lbw_rl.controllers.lbw_guard import LBWGuard

    rows = [line.split("|")[1] for line in (LBWGuard.__doc__ or "").splitlines() if line.strip().startswith("| ")]
    named = {name.strip() for row in rows for name in row.split("/")} - {"regime"}
    of_entropic = {"safe-mode", "out-of-band", "low-entropy", "high-entropy"}
    assert named | of_entropic == ALARMS | (HEALTHY_REGIMES - {"learned"})


def test_a_put_off_checkpoint_comes_back_after_a_resume(recipe, tmp_path, saved):
    regimes = ["steady"] * 7 + ["diverged"] * 3 + ["steady"] * 2
    interrupted(recipe(), tmp_path / "out", 9, controller=Alarmist(*regimes))
    assert saved == [4]
    run(recipe(), tmp_path / "out", resume=True, controller=Alarmist(*regimes))
    assert saved == [4, 11]
    run(recipe(), tmp_path / "straight", controller=Alarmist(*regimes))
    assert saved == [4, 11, 4, 11]
    assert outcome(tmp_path / "out") == outcome(tmp_path / "straight")


# ---- folders of other versions


def test_a_checkpoint_of_the_first_version_is_refused(recipe, tmp_path):
    interrupted(recipe(), tmp_path, 3)
    torch.save({"task": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"^resume: .*checkpoint\.pt is of lbw-rl 0\.1\.0, .*; accepted: [^\n]*$"):
        run(recipe(), tmp_path, resume=True)
    assert (tmp_path / "checkpoint.pt").exists()


def test_a_finished_run_of_the_first_version_is_returned(recipe, tmp_path):
    summary = run(recipe("train.measure_device=true"), tmp_path)
    saved = json.loads((tmp_path / "recipe.json").read_text())
    del saved["train"]["measure_device"]  # a setting that it did not know
    write_json(tmp_path / "recipe.json", saved)
    assert run(recipe("train.measure_device=true"), tmp_path, resume=True) == summary
    with pytest.raises(ValueError, match=r"differs in train\.measure_device"):
        run(recipe(), tmp_path, resume=True)


@pytest.mark.parametrize("content", [b"", b'{"name": "x"', b"\xff", b"[]", b'{"name": 3}'])
def test_a_folder_whose_recipe_is_unreadable_is_refused_on_one_line(content, recipe, tmp_path):
    (tmp_path / "recipe.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^resume: .*recipe\.json is no recipe [^\n]*; accepted: [^\n]*$"):
        run(recipe(), tmp_path, resume=True)
