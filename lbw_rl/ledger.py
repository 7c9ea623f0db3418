"""Append-only record of every decision: what was seen, proposed, executed, and why they differ."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

LEDGER_SCHEMA = 1


def _clean(value: Any) -> Any:
    """JSON has no NaN and no infinity: both read back as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(v) for v in value]
    return value


def _number(value: Any) -> float | None:
    """What json does not know (numpy and torch scalars) as a number."""
    return _clean(float(value))


def _cut_torn_line(path: Path) -> None:
    """Takes off a last line that a kill tore, so that the next record starts on a line of its own."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        torn = file.seek(0, os.SEEK_END)
        while torn > 0:
            start = max(0, torn - (1 << 16))
            file.seek(start)
            newline = file.read(torn - start).rfind(b"\n")
            if newline >= 0:
                torn = start + newline + 1
                break
            torn = start
        file.truncate(torn)


class Ledger:
    """One JSON object a line; the first is the header. A line is on its way to disk before the step goes on.

    Args:
        path: the file; its folder is made. An existing ledger is continued, not overwritten; a torn last line goes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(self.path)
        self._file: TextIO = self.path.open("a", buffering=1, encoding="utf-8")

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """Appends one record of the given kind.

        Raises:
            OSError: the disk is full or gone; the caller decides whether the run goes on without a ledger.
        """
        self._file.write(json.dumps({"type": kind, **_clean(record)}, separators=(",", ":"), default=_number) + "\n")

    def flush(self) -> None:
        """Brings what is written to the disk.

        Raises:
            OSError: as `write`.
        """
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes and closes the file."""
        self._file.close()


def truncate_ledger(path: str | Path, step: int) -> int:
    """Drops what a ledger says of `step` and later, and torn lines, so that a resumed run writes each step once.

    The lines that stay keep their bytes; the headers stay.

    Args:
        path: the ledger; where it is missing, nothing is done.
        step: the first step that will be written again.

    Returns:
        How many lines were dropped.

    Raises:
        OSError: the disk is full or gone; the ledger is as it was.
    """
    path = Path(path)
    if not path.is_file():
        return 0
    temporary = path.with_name(path.name + ".tmp")
    dropped = 0
    try:
        with path.open("rb") as file, temporary.open("wb") as kept:
            for line in file:
                if _comes_before(line, step):
                    kept.write(line)
                else:
                    dropped += 1
            kept.flush()
            os.fsync(kept.fileno())
        if dropped:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return dropped


def _comes_before(line: bytes, step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:  # neither JSON nor text
        return False
    return line.endswith(b"\n") and isinstance(record, dict) and record.get("step", -1) < step


def read_ledger(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a ledger in order; a last line torn by a kill is passed over.

    Raises:
        ValueError: the file is missing, or a line other than the last is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"ledger: {path} is not a file; accepted: a ledger.jsonl that a governed run wrote")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as e:
        raise ValueError(f"ledger: {path} is not text; accepted: a ledger.jsonl that a governed run wrote") from e
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as e:
            if number == len(lines):
                return
            raise ValueError(
                f"ledger: {path} line {number} is not JSON ({e.msg}); the file was altered or is no ledger"
            ) from e
        if not isinstance(record, dict) or "type" not in record:
            raise ValueError(
                f"ledger: {path} line {number} has no 'type'; accepted: a ledger.jsonl that a governed run wrote"
            )
        yield record
