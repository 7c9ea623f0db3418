"""Checkpoints: whole or not there, good or passed over, and no fault of the disk ends a run."""

import errno
import json
import logging
import math
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import disk_of

from lbw_rl import Action
from lbw_rl.controller import Controller
from lbw_rl.envs.recipe import Recipe, load_recipe, override
from lbw_rl.envs.task import TrainingTask
from lbw_rl.last_good import HEALTHY_REGIMES
from lbw_rl.ledger import truncate_jsonl
from lbw_rl.training_runs import checkpoints as module
from lbw_rl.training_runs import folders
from lbw_rl.training_runs.checkpoints import Checkpoints
from lbw_rl.training_runs.folders import JsonLines, first_line, replace_folder, write_json
from lbw_rl.training_runs.health import ALARMS
from lbw_rl.training_runs.run import run


@pytest.fixture
def _hf() -> None:
    pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")


@pytest.fixture
def kept(tmp_path: Path) -> Checkpoints:
    """A folder with the good checkpoints of steps 1 and 2."""
    made = Checkpoints(tmp_path / "checkpoints")
    assert made.save(1, state(1))
    assert made.save(2, state(2))
    return made


def state(step: int) -> dict[str, Any]:
    return {"weights": torch.full((500,), float(step)), "note": f"after {step}"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps(folder: Path) -> list[int]:
    return [int(name.split("-")[1]) for name in names(folder)]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "lbw_rl" and r.levelno == logging.WARNING]


# ---- saving and reading


def test_the_newest_two_stay_and_the_newest_is_read_back(kept):
    assert kept.save(100, state(100))
    assert steps(kept.folder) == [2, 100]
    first, second = names(kept.folder)
    assert first.startswith("step-00000002-")
    assert second == f"step-00000100-{module._hash(kept.folder / second)}.pt"
    step, found = Checkpoints(kept.folder).newest()
    assert (step, found["note"]) == (100, "after 100")
    assert torch.equal(found["weights"], state(100)["weights"])


def test_a_folder_without_checkpoints_has_no_newest(tmp_path, caplog):
    assert Checkpoints(tmp_path / "none").newest() is None
    assert names(tmp_path) == warnings(caplog) == []


def test_half_written_files_are_removed_and_other_files_are_left_alone(kept):
    (kept.folder / "step-00000003.tmp").write_bytes(b"half")
    (kept.folder / "notes.txt").write_text("mine")
    again = Checkpoints(kept.folder)
    assert len(names(kept.folder)) == 3
    assert again.newest()[0] == 2
    again.save(3, state(3))
    assert "notes.txt" in names(kept.folder)
    assert len(names(kept.folder)) == 3


def test_a_step_saved_again_leaves_two_checkpoints(kept):
    kept.save(2, {**state(2), "note": "again"})
    assert steps(kept.folder) == [2, 2]
    kept.save(2, {**state(2), "note": "again"})  # the same bytes: the same name
    assert steps(kept.folder) == [2, 2]
    kept.save(3, state(3))
    assert steps(kept.folder) == [2, 3]


def test_no_code_is_unpickled(kept, caplog):
    kept.save(3, {"code": os.system})
    assert Checkpoints(kept.folder).newest()[0] == 2
    assert "torch cannot load it (UnpicklingError" in warnings(caplog)[0]


# ---- files that are not what was written


def newest_file(folder: Path) -> Path:
    return folder / names(folder)[-1]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def under_its_own_hash(path: Path, step: int = 2) -> None:
    path.rename(path.with_name(f"step-{step:08d}-{module._hash(path)}.pt"))


def garbage_of_that_hash(path: Path) -> None:
    path.write_bytes(b"garbage" * 100)
    under_its_own_hash(path)


def another_tensor_file(path: Path) -> None:
    torch.save([1, 2], path)
    under_its_own_hash(path)


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = {
    "flipped byte": (flip_a_byte, "altered or cut short"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1), "altered or cut short"),
    "half": (lambda path: os.truncate(path, path.stat().st_size // 2), "altered or cut short"),
    "empty": (lambda path: os.truncate(path, 0), "altered or cut short"),
    "zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "altered or cut short"),
    "garbage": (lambda path: path.write_bytes(b"garbage" * 100), "altered or cut short"),
    "wrong hash": (lambda path: path.rename(path.with_name("step-00000002-0123456789abcdef.pt")), "altered or cut"),
    "garbage of that hash": (garbage_of_that_hash, "torch cannot load it ("),
    "no state": (another_tensor_file, "it holds no state of a run"),
    "another step": (lambda path: under_its_own_hash(path, 9), "it holds step 2, its name says 9"),
}


def test_a_checkpoint_that_cannot_be_read_at_all_ends_the_resume_since_it_may_be_good(kept):
    """Another owner's file, a disk that is away for a moment: to start anew would replace good work."""
    newest = max(kept.folder.glob("*.pt"))
    newest.unlink()
    newest.mkdir()
    with pytest.raises(ValueError, match=r"resume: .* cannot be read \(Is a directory\); accepted: "):
        Checkpoints(kept.folder).newest()
    assert newest.exists()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_checkpoint_is_passed_over_and_said_so(damage, kept, caplog):
    spoil, reason = DAMAGE[damage]
    good = names(kept.folder)[0]
    spoil(newest_file(kept.folder))
    bad = newest_file(kept.folder).name
    again = Checkpoints(kept.folder)
    step, found = again.newest()
    assert (step, found["note"]) == (1, "after 1")
    (line,) = warnings(caplog)
    assert line.startswith(f"checkpoint {bad} passed over: ")
    assert reason in line
    assert line.endswith(f"; {good} is used instead")
    assert "\n" not in line
    assert again.save(3, state(3))
    assert steps(kept.folder) == [1, 3]  # what is bad does not count as one of the two
    assert Checkpoints(kept.folder).newest()[0] == 3


def test_where_none_is_good_the_run_starts_anew(kept, caplog):
    for name in names(kept.folder):
        flip_a_byte(kept.folder / name)
    assert Checkpoints(kept.folder).newest() is None
    said = warnings(caplog)
    assert [line.split()[1] for line in said] == names(kept.folder)[::-1]
    assert all(line.endswith("; none that is good is left, the run starts from the beginning") for line in said)


# ---- faults of the disk, injected at every point of a save


def failing(*_: Any, **__: Any) -> Any:
    raise OSError(errno.EIO, "Input/output error")


def fail_on(monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    calls = {"open": 0, "fsync": 0}
    plain_open, plain_fsync = Path.open, os.fsync

    def open_(path: Path, *args: Any, **kwargs: Any) -> Any:
        calls["open"] += 1
        return failing() if f"open {calls['open']}" == point else plain_open(path, *args, **kwargs)

    def fsync(descriptor: int) -> None:
        calls["fsync"] += 1
        if f"fsync {calls['fsync']}" == point:
            failing()
        plain_fsync(descriptor)

    def torn(content: Any, file: Any) -> None:
        file.write(b"half")
        failing()

    monkeypatch.setattr(Path, "open", open_)  # 1: to write, 2: to hash
    monkeypatch.setattr(os, "fsync", fsync)  # 1: the file, 2: its folder
    if point == "write":
        monkeypatch.setattr(torch, "save", torn)
    elif point == "rename":
        monkeypatch.setattr(os, "replace", failing)
    elif point == "unlink":
        monkeypatch.setattr(Path, "unlink", failing)


@pytest.mark.parametrize("point", ["open 1", "write", "fsync 1", "open 2", "rename", "fsync 2"])
def test_a_disk_that_fails_costs_the_checkpoint_alone(point, kept, caplog, monkeypatch):
    before = names(kept.folder)
    for step in (3, 4):
        with monkeypatch.context() as patch:
            fail_on(patch, point)
            assert not kept.save(step, state(step))
    assert warnings(caplog) == [
        "the checkpoint of step 3 was not written, the run goes on without it: Input/output error"
    ]
    assert kept.failures == 2
    assert names(kept.folder)[:2] == before  # nothing is removed before something newer is safe
    assert steps(kept.folder)[2:] == ([3, 4] if point == "fsync 2" else [])  # whole, perhaps not yet on disk
    assert Checkpoints(kept.folder).newest()[0] == (4 if point == "fsync 2" else 2)
    assert kept.save(5, state(5))
    assert steps(kept.folder) == [2, 5]
    again = Checkpoints(kept.folder)
    assert again.newest()[0] == 5
    assert again.failures == 2  # the count is the run's, not the process'


def test_an_old_checkpoint_that_cannot_be_removed_stays(kept, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        fail_on(patch, "unlink")
        assert kept.save(3, state(3))
    assert steps(kept.folder) == [1, 2, 3]
    assert kept.save(4, state(4))
    assert steps(kept.folder) == [3, 4]
    assert warnings(caplog) == []


def test_a_folder_that_cannot_be_made_costs_the_checkpoint_alone(tmp_path, caplog):
    (tmp_path / "checkpoints").write_text("a file")
    assert not Checkpoints(tmp_path / "checkpoints").save(1, state(1))
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("size", [0, 100, 1500])
def test_a_full_disk_costs_the_checkpoint_alone(size, kept, caplog):
    before = names(kept.folder)
    with disk_of(size):  # the kernel's own refusal, which torch reports as something else
        assert not kept.save(3, state(3))
    assert names(kept.folder) == before
    assert "the run goes on without it: File too large" in warnings(caplog)[0]


def test_an_error_that_is_not_the_disks_is_not_hidden(kept, monkeypatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        kept.save(3, state(3))
    assert steps(kept.folder) == [1, 2]


# ---- the other files of a run


@pytest.mark.parametrize("point", ["open 1", "fsync 1", "rename"])
def test_json_is_replaced_at_once_or_not_at_all(point, tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"a": 1})
    with monkeypatch.context() as patch:
        fail_on(patch, point)
        with pytest.raises(OSError, match="Input/output"):
            write_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert names(tmp_path) == ["x.json"]


def test_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch):
    def make(name: str, *files: str) -> Path:
        (tmp_path / name / "deep").mkdir(parents=True)
        for file in files:
            (tmp_path / name / "deep" / file).write_text(file)
        return tmp_path / name

    replace_folder(make("model.tmp", "a", "b"), tmp_path / "model")
    assert names(tmp_path) == ["model"]
    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "fsync", failing)
        with pytest.raises(OSError, match="Input/output"):
            replace_folder(make("model.tmp", "c"), tmp_path / "model")
    assert names(tmp_path / "model/deep") == ["a", "b"]
    make("model.old.tmp", "left by a kill")
    replace_folder(tmp_path / "model.tmp", tmp_path / "model")
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model/deep") == ["c"]


def test_a_line_that_the_disk_does_not_take_is_left_out(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as lines:
        lines.write({"step": 0})
        with disk_of(15):  # in the middle of the second line
            lines.write({"step": 1})
            lines.write({"step": 2})
        lines.write({"step": 3})
        lines.sync()
    assert path.read_text() == '{"step":0}\n{"step":3}\n'
    assert warnings(caplog) == ["metrics.jsonl lacks lines that the disk did not take: File too large"] or (
        warnings(caplog) == ["metrics.jsonl lacks lines that the disk did not take: No space left on device"]
    )


def test_lines_that_have_no_file_cost_a_warning(tmp_path, caplog):
    """A full disk does not even take the name of a new file."""
    (tmp_path / "metrics.jsonl").mkdir()
    with JsonLines(tmp_path / "metrics.jsonl") as lines:
        lines.write({"step": 0})
        lines.sync()
    assert warnings(caplog) == ["metrics.jsonl lacks lines that the disk did not take: Is a directory"]


def test_a_failing_sync_is_no_fault_of_the_run(tmp_path, monkeypatch, caplog):
    with JsonLines(tmp_path / "x") as lines:
        monkeypatch.setattr(os, "fsync", failing)
        lines.sync()
    assert len(warnings(caplog)) == 1


HEADER = '{"type":"header","schema":1}\n'
DECISIONS = [f'{{"type":"decision","step":{i},"é":1.0e0}}\n' for i in range(5)]

LEDGERS = {
    "whole": ([HEADER, *DECISIONS], 3),
    "torn at the end": ([HEADER, *DECISIONS[:3], '{"type":"deci'], 3),
    "ends too early": ([HEADER, *DECISIONS[:2]], 2),
    "torn header": ([HEADER[5:], *DECISIONS], 3),
    "torn first lines": ([HEADER[5:], DECISIONS[0][9:], *DECISIONS[1:]], 2),
    "no header": (DECISIONS, 3),
    "two headers": ([HEADER, DECISIONS[0], HEADER, *DECISIONS[1:]], 3),
    "header too late": ([DECISIONS[0], HEADER, *DECISIONS[1:]], 3),
    "zeros in the middle": ([HEADER, DECISIONS[0], "\0" * 40 + "\n", *DECISIONS[2:]], 2),
    "other JSON": ([HEADER, "3\n", '{"step":"x"}\n', *DECISIONS], 3),
    "empty": ([], 0),
}


@pytest.mark.parametrize("case", LEDGERS)
def test_a_damaged_ledger_keeps_its_good_lines_and_one_header(case, tmp_path):
    path = tmp_path / "ledger.jsonl"
    content, good = LEDGERS[case]
    path.write_text("".join(content), encoding="utf-8")
    assert truncate_jsonl(path, 3, HEADER.rstrip("\n"))["decision"] == good
    first, *rest = path.read_text(encoding="utf-8").splitlines(keepends=True)
    assert first == HEADER
    assert rest == [line for line in content if line in DECISIONS[:3]]


def test_a_ledger_that_is_not_text_loses_those_lines_alone(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(HEADER.encode() + b"\xff\xfe\n" + DECISIONS[0].encode())
    assert truncate_jsonl(path, 3) == {"decision": 1}
    assert path.read_text(encoding="utf-8") == HEADER + DECISIONS[0]


def test_a_missing_file_is_not_made(tmp_path):
    assert truncate_jsonl(tmp_path / "ledger.jsonl", 3, HEADER) == {}
    assert first_line(tmp_path / "ledger.jsonl") is None
    assert names(tmp_path) == []


# ---- in a run


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


def test_events_between_decisions_stay_and_are_no_decisions(tmp_path):
    path = tmp_path / "ledger.jsonl"
    events = [f'{{"type":"mode","step":{i}}}\n' for i in (1, 3)]
    path.write_text(HEADER + DECISIONS[0] + events[0] + events[1], encoding="utf-8")
    assert truncate_jsonl(path, 3) == {"decision": 1, "mode": 1}
    assert path.read_text(encoding="utf-8") == HEADER + DECISIONS[0] + events[0]


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
