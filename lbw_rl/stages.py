"""How much of its authority governance may use now, and who may change that while a run goes on."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args

log = logging.getLogger("lbw_rl")

Mode = Literal["off", "shadow", "skip", "lr", "govern"]
MODES: tuple[Mode, ...] = get_args(Mode)
"""In order of authority: nothing at all; decide and log; also skip updates; also scale the rate and the momentum; also
roll back (what the `Authority` permits, no more). The order is that of a careful roll-out."""

_POLL_SECONDS = 0.5


def check_mode(mode: str) -> Mode:
    """The mode, if there is one of that name.

    Raises:
        ValueError: there is none.
    """
    if mode not in MODES:
        raise ValueError(f"mode: {mode!r} is unknown; accepted: {', '.join(MODES)}")
    return mode


class Switch:
    """Where requests for another mode come in: a control file, a kill signal, a call.

    The file holds one word, a mode; it is looked at twice a second by a thread of its own, so that a slow file system
    holds no step up. What it says when the run starts counts too.

    Args:
        control: the file; it need not exist.
        kill_signal: for instance `signal.SIGUSR1`: governance goes off. Handlers installed before are called as well.
            Only the main thread can install it.
    """

    def __init__(self, control: str | Path | None = None, kill_signal: int | None = None) -> None:
        self._wish: tuple[Mode, str] | None = None
        self._file = Path(control) if control is not None else None
        self._seen: str | None = None
        self._closed = threading.Event()
        self._signal = kill_signal
        self._previous: Callable[[int, FrameType | None], Any] | int | None = None
        if kill_signal is not None:
            self._previous = signal.signal(kill_signal, self._on_signal)
        if self._file is not None:
            self._look()
            threading.Thread(target=self._watch, name="lbw-rl control file", daemon=True).start()

    def ask(self, mode: Mode, by: str) -> None:
        """Files a request; the newest one stands."""
        self._wish = (mode, by)

    def take(self) -> tuple[Mode, str] | None:
        """The request that waits, if any: (mode, who asked). It is then settled."""
        wish, self._wish = self._wish, None
        return wish

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.ask("off", signal.Signals(number).name)
        if callable(self._previous):
            self._previous(number, frame)

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            self._look()

    def _look(self) -> None:
        assert self._file is not None
        try:
            word = self._file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):  # not there yet, or being written
            return
        if not word or word == self._seen:
            return
        self._seen = word
        if word in MODES:
            self.ask(word, str(self._file))
        else:
            log.warning("control file %s: %r is no mode; accepted: %s", self._file, word[:40], ", ".join(MODES))

    def close(self) -> None:
        """Stops watching, and gives the signal back to who had it."""
        self._closed.set()
        if self._signal is not None:
            with contextlib.suppress(ValueError):  # not the main thread: it stays, and asks nobody
                if signal.getsignal(self._signal) == self._on_signal:
                    signal.signal(self._signal, self._previous or signal.SIG_DFL)
            self._signal = None
