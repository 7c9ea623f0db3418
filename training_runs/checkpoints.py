"""Checkpoints as files that are whole or not there at all: the name of each carries the hash of its content."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lbw_rl.files import sync_folder

log = logging.getLogger("lbw_rl")

KEPT = 2
"""How many good checkpoints stay: one more than needed, since disks alter what they hold."""

_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.pt")


class Checkpoints:
    """The checkpoints of one run, `step-00000100-<hash>.pt` each.

    A file gets its name only when all of it is on disk, by one atomic rename, and the hash is part of the name: there
    is no second file that could disagree with it. What a kill left half-written is removed here.

    Args:
        folder: where they are; made with the first of them.

    Attributes:
        failures: checkpoints that the disk did not take, over the whole run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failures = 0
        self._warned = False
        self._good: list[Path] = []  # known to be: written or verified by this process; oldest first
        for stale in folder.glob("*.tmp"):
            _remove(stale)

    def save(self, step: int, state: Mapping[str, Any]) -> bool:
        """Commits the state after `step` steps, then removes all but the newest two good checkpoints.

        A disk that does not take it costs this checkpoint, not the run: counted, warned of once, and the earlier
        checkpoints stay.

        Args:
            step: optimizer steps done.
            state: tensors and plain data, as `torch.load(weights_only=True)` accepts them.

        Returns:
            Whether the checkpoint is on disk.
        """
        try:
            path = self._commit(step, state)
        except OSError as e:
            self.failures += 1
            if not self._warned:
                self._warned = True
                reason = e.strerror or e
                log.warning("the checkpoint of step %d was not written, the run goes on without it: %s", step, reason)
            return False
        self._good = [*(good for good in self._good if good != path), path][-KEPT:]
        for _, other in self._files():
            if other not in self._good:
                _remove(other)
        return True

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """The newest good checkpoint, as (step, state); None where there is none.

        One that is torn or altered is passed over, with one logged line that says why and what is used instead.

        Raises:
            ValueError: one that may be good cannot be read.
        """
        refused: list[tuple[Path, str]] = []
        found: tuple[int, dict[str, Any]] | None = None
        instead = "none that is good is left, the run starts from the beginning"
        for step, path in sorted(self._files(), reverse=True):
            try:
                self.failures, state = _read(path, step)
            except _Refused as e:
                refused.append((path, str(e)))
                continue
            self._good, found, instead = [path], (step, state), f"{path.name} is used instead"
            break
        for path, reason in refused:
            log.warning("checkpoint %s passed over: %s; %s", path.name, reason, instead)
        return found

    @property
    def latest(self) -> Path:
        """The newest checkpoint that is known to be good; there is one after `save` or `newest` has succeeded."""
        return self._good[-1]

    def clear(self) -> None:
        """Removes them all: the run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _commit(self, step: int, state: Mapping[str, Any]) -> Path:
        if not self.folder.exists():
            self.folder.mkdir()
            sync_folder(self.folder.parent)
        temporary = self.folder / f"step-{step:08d}.tmp"
        try:
            with temporary.open("wb") as file:
                _write({"step": step, "failures": self.failures, "state": dict(state)}, file)
                file.flush()
                os.fsync(file.fileno())
            path = self.folder / f"step-{step:08d}-{_hash(temporary)}.pt"
            os.replace(temporary, path)
        finally:
            _remove(temporary)
        sync_folder(self.folder)  # else a power loss may take the rename back after the older ones were removed
        return path

    def _files(self) -> list[tuple[int, Path]]:
        if not self.folder.is_dir():
            return []
        try:
            paths = list(self.folder.iterdir())
        except OSError as e:
            raise _unreadable(self.folder, e) from e
        named = ((_NAME.fullmatch(path.name), path) for path in paths)
        return [(int(match[1]), path) for match, path in named if match]


def read_checkpoint(path: Path, step: int) -> dict[str, Any]:
    """The state in a file that another process has just verified; its tensors stay in the file until they are used.

    Args:
        path: what `Checkpoints.latest` said there.
        step: optimizer steps done.

    Raises:
        ValueError: it cannot be read here.
    """
    try:
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except OSError as e:
        raise _unreadable(path, e) from e
    assert content["step"] == step
    return content["state"]


class _Refused(Exception):
    """A file that is no good checkpoint; the message says why."""


def _write(content: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as e:
        # torch hides a disk's error behind its own complaint, that the archive could not be closed.
        if isinstance(e.__context__, OSError):
            raise e.__context__ from None
        raise


def _read(path: Path, step: int) -> tuple[int, dict[str, Any]]:
    """(failures so far, state).

    Raises:
        _Refused: the file is not what was written under that name.
        ValueError: it cannot be read at all; it may be good, and a run that started anew would replace it.
    """
    try:
        found = _hash(path)
    except OSError as e:
        raise _unreadable(path, e) from e
    wanted = path.stem.rpartition("-")[2]
    if found != wanted:
        raise _Refused(f"its content was altered or cut short (sha256 {found}…, written was {wanted}…)")
    try:
        # A run from a GPU can go on without one; where there is one, tensors return to where they were.
        content = torch.load(path, weights_only=True, map_location=None if torch.cuda.is_available() else "cpu")
    except MemoryError:  # says nothing about the file
        raise
    except Exception as e:  # torch, zipfile and pickle raise whatever they meet
        raise _Refused(f"torch cannot load it ({type(e).__name__}: {' '.join(str(e).split())[:120]})") from e
    if not isinstance(content, dict) or not content.keys() >= {"step", "failures", "state"}:
        raise _Refused("it holds no state of a run")
    if content["step"] != step:
        raise _Refused(f"it holds step {content['step']}, its name says {step}")
    return content["failures"], content["state"]


def _unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"resume: {path} cannot be read ({error.strerror or error}); accepted: a readable checkpoint, or a new --out"
    )


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # a file that stays costs space, no more
        path.unlink(missing_ok=True)
