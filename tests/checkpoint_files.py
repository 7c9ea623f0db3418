"""What tests of checkpoints and of the other files of a run look at, and disks that fail them."""

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps(folder: Path) -> list[int]:
    return [int(name.split("-")[1]) for name in names(folder)]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "lbw_rl" and r.levelno == logging.WARNING]


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


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
