"""How the command line talks: progress on a terminal, whole lines in a pipe, one line for an error."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lbw_rl import launch
from lbw_rl.cli.pace import Pace

_TERMINAL = sys.stdout.isatty()

# Paths and labels are printed as they are: brackets in them are no markup. A pipe has no width to cut tables at.
out = Console(highlight=False, markup=False, emoji=False, soft_wrap=not _TERMINAL, width=None if _TERMINAL else 1000)
"""Standard output: results."""

err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=not sys.stderr.isatty())
"""Standard error: progress and errors, so that a pipe gets results alone."""


def fail(message: str, code: int = 2, alike: bool = True) -> int:
    """Prints one line on what is wrong and returns the exit code.

    Args:
        message: the line.
        code: the exit code.
        alike: whether the other ranks may have the same to say: then it is printed once, for which they wait for the first.
    """
    message = " ".join(message.split())
    line = launch.wording(message) if alike else message
    if line is not None:
        print(f"lbw-rl: {line}", file=sys.stderr, flush=True)
    if alike:
        launch.said(message)
    return code


def emit_json(value: Any) -> None:
    """Prints a JSON document on standard output; what is no number (NaN, infinity) becomes null."""
    print(json.dumps(_finite(value), indent=2, default=str, allow_nan=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


class Meter:
    """One line of progress: a live bar on a terminal; in a pipe a line every few seconds, with time passed and time left."""

    def __init__(self, label: str, bar: Progress | None, every: float = 10.0) -> None:
        self.label = label
        self._bar = bar
        self._task = bar.add_task(label, total=None, note="") if bar is not None else None
        self._every = every
        self._start = time.monotonic()
        self._next = self._start + every
        self._pace = Pace()

    def update(self, done: int, total: int, note: str = "") -> None:
        """Shows that `done` of `total` are finished, with a short note."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)
            return
        now = time.monotonic()
        left = self._pace.left(now - self._start, done, total)
        if now >= self._next or done == total:
            self._next = now + self._every
            times = f"{_clock(now - self._start)} elapsed" + (f", {_clock(left)} left" if left else "")
            print(f"{self.label}: {done}/{total} [{times}] {note}".rstrip(), file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def meter(label: str) -> Iterator[Meter]:
    """A `Meter` for the length of a block."""
    if not err.is_terminal:
        yield Meter(label, None)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=err) as bar:
        yield Meter(label, bar)
