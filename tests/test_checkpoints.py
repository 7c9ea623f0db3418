"""Checkpoints: whole or not there, good or passed over, and no fault of the disk is an error."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import fail_on, flip_a_byte, names, steps, warnings
from full_disk import disk_of

from lbw_rl.training_runs import checkpoints as module
from lbw_rl.training_runs.checkpoints import Checkpoints


@pytest.fixture
def kept(tmp_path: Path) -> Checkpoints:
    """A folder with the good checkpoints of steps 1 and 2."""
    made = Checkpoints(tmp_path / "checkpoints")
    assert made.save(1, state(1))
    assert made.save(2, state(2))
    return made


def state(step: int) -> dict[str, Any]:
    return {"weights": torch.full((500,), float(step)), "note": f"after {step}"}


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
