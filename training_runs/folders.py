"""Output folders and the files in them: nothing is overwritten, nothing is left half-written."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lbw_rl.files import WholeLines, replace_file, sync_files, sync_folder

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

    A line that the disk does not take is left out, and all are where it does not take the file: warned of once, and the run
    that writes them goes on.

    Args:
        path: continued if it exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._warned = False
        self._lines: WholeLines | None = None
        with self._warning():
            self._lines = WholeLines(path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record."""
        if self._lines is not None:
            with self._warning():
                self._lines.append(json.dumps(record, separators=(",", ":")).encode() + b"\n")

    def sync(self) -> None:
        """Puts on disk what has been written so far."""
        if self._lines is not None:
            with self._warning():
                self._lines.sync()

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            if not self._warned:
                log.warning("%s lacks lines that the disk did not take: %s", self.path.name, e.strerror or e)
            self._warned = True

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines is not None:
            with self._warning():
                self._lines.close()


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file; stops at a line that is none, torn by a kill. A missing file has none."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
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
