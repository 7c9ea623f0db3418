"""Files that are never left half-written."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on disk: a rename survives a power loss only after this.

    Raises:
        OSError: the disk failed.
    """
    if os.name != "posix":  # Windows opens no folders, and its renames are journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Puts the files in a folder, and their names, on disk: what is renamed after this is whole.

    Raises:
        OSError: the disk failed.
    """
    for path in (p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


class WholeLines:
    """A file that grows by whole lines: what the disk does not take of one does not stay there either.

    Nothing waits in memory, where a kill would take it, and where later lines would be written behind half of an earlier one.

    Args:
        path: continued if it exists.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def append(self, line: bytes) -> None:
        """Writes a line, its end included.

        Raises:
            OSError: the disk is full or gone; the file is as it was.
        """
        written = self._file.write(line) or 0
        if written < len(line):
            with contextlib.suppress(OSError):
                self._file.truncate(self._file.tell() - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Puts on disk what has been written so far.

        Raises:
            OSError: the disk failed.
        """
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file in one atomic replacement that outlives a power loss.

    Raises:
        OSError: the disk is full or gone; the file is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
