"""Files that are never left half-written."""

from __future__ import annotations

import contextlib
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
