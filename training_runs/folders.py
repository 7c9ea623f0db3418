"""Output folders and the files in them: nothing is overwritten, nothing is left half-written."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lbw_rl.files import replace_file, sync_files, sync_folder

log = logging.getLogger("lbw_rl")


def prepare_output(folder: str | Path, resume: bool) -> Path:
    """Makes an output folder, or accepts the one that a resumed command left.

    Raises:
        ValueError: the folder is a file, cannot be made or written, or holds something and `resume` is false.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file; accepted: a new or empty folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = any(folder.iterdir())
    except OSError as e:
        raise ValueError(f"out: {folder} cannot be made ({e.strerror}); accepted: a writable place") from e
    if used and not resume:
        raise ValueError(f"out: {folder} is not empty; accepted: a new or empty folder, or --resume to continue it")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"out: {folder} cannot be written; accepted: a writable place")
    return folder


def remove_empty(folder: Path) -> None:
    """Removes the folders below `folder`, and itself, that hold nothing."""
    for path in (*sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True), folder):
        with contextlib.suppress(OSError):  # not empty
            path.rmdir()


def write_json(path: Path, value: Any) -> None:
    """Writes JSON in one atomic replacement that survives a power loss.

    Raises:
        OSError: the disk is full or gone; the file is as it was.
    """
    replace_file(path, json.dumps(value, indent=2).encode() + b"\n")


def replace_folder(new: Path, folder: Path) -> None:
    """Gives the finished folder `new` the name `folder`, at once; what had that name is removed.

    Raises:
        OSError: the disk failed; `folder` is as it was, or not there.
    """
    sync_files(new)
    old = folder.with_name(folder.name + ".old.tmp")  # a folder can only be renamed onto an empty one
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


class JsonLines:
    """A JSONL file that is appended to, a whole line at a time.

    A line that the disk does not take is left out: warned of once, and the run that writes it goes on.

    Args:
        path: continued if it exists.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)  # nothing stays in memory that a kill would take
        self._warned = False

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            with contextlib.suppress(OSError):  # half a line would hide those after it
                self._file.truncate(end)
            self._warn(e)

    def sync(self) -> None:
        """Puts on disk what has been written so far."""
        try:
            os.fsync(self._file.fileno())
        except OSError as e:
            self._warn(e)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s lacks lines that the disk did not take: %s", self.path.name, error.strerror or error)

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file; stops at a line torn by a kill. A missing file has none."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def first_line(path: Path) -> str | None:
    """The first line of a text file without its end; None where there is no file or no whole line."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        line = file.readline()
    return line[:-1].decode(errors="replace") if line.endswith(b"\n") else None
