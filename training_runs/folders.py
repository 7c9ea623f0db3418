"""Output folders and the files in them: nothing is overwritten, nothing is left half-written."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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
    """Writes JSON in one atomic replacement."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file; stops at a line torn by a kill. A missing file has none."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def truncate_jsonl(path: Path, step: int) -> None:
    """Drops the records at or after `step`, so that a resumed run writes each of them once."""
    if not path.exists():
        return
    kept = [record for record in read_jsonl(path) if record.get("step", -1) < step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(r, separators=(",", ":")) + "\n" for r in kept), encoding="utf-8")
    os.replace(temporary, path)
