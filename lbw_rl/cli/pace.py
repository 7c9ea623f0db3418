"""How long a piece of work will still take, by what has been done of it lately."""

from __future__ import annotations

from bisect import bisect_right


class Pace:
    """Extrapolates the pace of the later half of the time so far.

    The later half, since a resumed command finds its finished runs within the first seconds: they say nothing of how long a
    run takes. The time before the first call counts for nothing either.
    """

    def __init__(self) -> None:
        self._times: list[float] = []
        self._done: list[int] = []

    def left(self, elapsed: float, done: int, total: int) -> float | None:
        """Seconds that the rest will take; None where that cannot be told yet.

        Args:
            elapsed: seconds since the beginning, not less than in the call before.
            done: pieces that are done, of `total`.
        """
        if len(self._times) > 1 and elapsed < 1.01 * self._times[-2]:  # a week needs about as many points as an hour
            self._times.pop()
            self._done.pop()
        self._times.append(elapsed)
        self._done.append(done)
        i = max(0, bisect_right(self._times, elapsed / 2) - 1)
        seconds, pieces = elapsed - self._times[i], done - self._done[i]
        return seconds / pieces * (total - done) if seconds > 0 and pieces > 0 else None
