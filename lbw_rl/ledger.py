"""Append-only record of every decision: what was seen, proposed, executed, and why they differ."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lbw_rl.files import WholeLines, replace_file

LEDGER_SCHEMA = 1
_FIRST_BYTES = b'{"type":'


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


def _refuse_another_file(path: Path) -> None:
    """A mistyped path must not cost the file that is there."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        first = file.read(len(_FIRST_BYTES))
    if not _FIRST_BYTES.startswith(first):
        raise FileExistsError(f"{path} is no ledger, and is left as it is")


class Ledger:
    """One JSON object a line; the first is the header. A line is on its way to disk before the step goes on.

    Args:
        path: the file; its folder is made. An existing ledger is continued, not overwritten; a torn last line goes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_another_file(self.path)
        _cut_torn_line(self.path)
        self._lines = WholeLines(self.path)

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """Appends one record of the given kind.

        Raises:
            OSError: the disk is full or gone; the caller decides whether the run goes on without the line.
        """
        line = json.dumps({"type": kind, **_clean(record)}, separators=(",", ":"), default=_number)
        self._lines.append(line.encode() + b"\n")

    def flush(self) -> None:
        """Brings what is written to the disk.

        Raises:
            OSError: as `write`.
        """
        self._lines.sync()

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


def ledger_of_rank(ledger: str | Path | None, rank: int) -> Path | None:
    """Where a rank writes its ledger, since two processes must not share a file: rank 0 as it is, others NAME.rank<r>."""
    if ledger is None:
        return None
    path = Path(ledger)
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def truncate_jsonl(path: str | Path, step: int, header: str | None = None) -> Counter[str]:
    """Drops the records at or after `step` and all torn lines, so that a resumed run writes each record once.

    The lines that stay keep their bytes. Headers, records without a step, stay;
    a repetition of one goes, and the first comes first.

    Args:
        path: the file; where it is missing, nothing is done.
        step: the first step that will be written again.
        header: the line to start with where the file has lost its own.

    Returns:
        How many records of each `type` were kept ("" for records without one), the header not counted.

    Raises:
        OSError: the disk is full or gone; the file is as it was.
    """
    path = Path(path)
    kept: Counter[str] = Counter()
    if not path.is_file():
        return kept
    records: list[bytes] = []
    latest: bytes | None = None  # header
    first_header = 0
    with path.open("rb") as written:
        for line in written:
            record = _whole_record(line)
            at = record.get("step") if record is not None else "torn"
            if at is None and line != latest:
                first_header = len(records) if latest is None else first_header
                latest = line
                records.append(line)
            elif record is not None and isinstance(at, int) and at < step:
                records.append(line)
                kept[str(record.get("type", ""))] += 1
    if latest is None and header is not None:
        records.insert(0, header.encode() + b"\n")
    elif first_header:
        records.insert(0, records.pop(first_header))
    lines = b"".join(records)
    if lines != path.read_bytes():
        replace_file(path, lines)
    return kept


def latest_header(path: str | Path) -> dict[str, Any] | None:
    """The newest header of a ledger, None where there is none."""
    path, found = Path(path), None
    if not path.is_file():
        return None
    with path.open("rb") as file:
        for line in file:
            if line.startswith(b'{"type":"header"'):
                found = _whole_record(line) or found
    return found


def _whole_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode())
    except ValueError:  # neither JSON nor text
        return None
    return record if line.endswith(b"\n") and isinstance(record, dict) else None


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
