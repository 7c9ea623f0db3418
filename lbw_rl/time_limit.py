"""Runs somebody else's code with a limit on how long the run waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any


class TimeLimit:
    """Calls functions on a thread of its own and gives up waiting after `seconds`.

    A call that hangs cannot be ended in Python: it is left behind on its daemon thread, and until it returns every
    further call is refused at once, so that a hanging controller costs the run one wait and no more.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._calls: SimpleQueue[tuple[int, Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        self._answers: SimpleQueue[tuple[int, Any, Exception | None]] = SimpleQueue()
        self._ticket = self._answered = 0
        self._thread: threading.Thread | None = None

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """The function's answer.

        Raises:
            TimeoutError: it has not answered in time, or is still busy with an earlier call.
            Exception: what it raised.
        """
        while self._answered < self._ticket:
            try:
                self._answered = self._answers.get_nowait()[0]  # a late answer to a call given up
            except Empty:
                raise TimeoutError(f"still busy with an earlier call after {self.seconds:g} s") from None
        if self._thread is None or not self._thread.is_alive():  # none yet, or lost in a fork
            self._thread = threading.Thread(target=self._serve, name="lbw-rl controller", daemon=True)
            self._thread.start()
        self._ticket += 1
        self._calls.put((self._ticket, function, args))
        try:
            self._answered, value, error = self._answers.get(timeout=self.seconds)
        except Empty:
            raise TimeoutError(f"no answer within {self.seconds:g} s") from None
        if error is not None:
            raise error
        return value

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            ticket, function, args = call
            try:
                self._answers.put((ticket, function(*args), None))
            except Exception as e:
                self._answers.put((ticket, None, e))

    def close(self) -> None:
        """Lets the thread end once it is idle."""
        self._calls.put(None)
        self._thread = None
