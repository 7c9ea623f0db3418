"""How much of its authority governance may use now, and who may change that while a run goes on."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import weakref
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


def governs(mode: Mode) -> bool:
    """Whether governance acts on the run in this mode, be it by skips alone."""
    return mode not in ("off", "shadow")


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
            arguments = (weakref.ref(self), self._closed)  # a switch that is dropped unclosed takes its thread along
            threading.Thread(target=_watch, args=arguments, name="lbw-rl control file", daemon=True).start()

    @property
    def killed(self) -> bool:
        """Whether a request to let go waits."""
        return self._wish is not None and self._wish[0] == "off"

    def ask(self, mode: Mode, by: str) -> None:
        """Files a request; the newest one stands."""
        if self._wish is None or self._wish[0] != "off":  # nothing takes a kill back
            self._wish = (mode, by)

    def take(self) -> tuple[Mode, str] | None:
        """The request that waits, if any: (mode, who asked). It is then settled."""
        wish, self._wish = self._wish, None
        return wish

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.ask("off", signal.Signals(number).name)
        if callable(self._previous):
            self._previous(number, frame)

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

    def _to_give_back(self) -> Any:
        """Who had the signal; never the default action of SIGUSR1 and 2, which ends the process: kill may come twice."""
        if callable(self._previous) or self._signal not in (signal.SIGUSR1, signal.SIGUSR2):
            return self._previous or signal.SIG_DFL
        return signal.SIG_IGN

    def close(self) -> None:
        """Stops watching, and gives the signal back to who had it."""
        self._closed.set()
        if self._signal is not None:
            with contextlib.suppress(ValueError):  # not the main thread: it stays, and asks nobody
                if signal.getsignal(self._signal) == self._on_signal:
                    signal.signal(self._signal, self._to_give_back())
            self._signal = None


def _watch(reference: weakref.ref[Switch], closed: threading.Event) -> None:
    while not closed.wait(_POLL_SECONDS):
        switch = reference()
        if switch is None:
            return
        switch._look()
        del switch
