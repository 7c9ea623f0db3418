"""One collective per decision: every rank learns what every other measured, and decides from the same numbers."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

Vector = NDArray[np.float32]


class PeerLostError(RuntimeError):
    """A rank did not take part in a collective: the run cannot go on, whoever governs it."""


def reason_of(error: Exception) -> str:
    """What a backend says of a lost rank, on one line: without gloo's source file before it, and its advice behind it."""
    text = " ".join(str(error).split())
    return re.sub(r"^\[\S+:\d+\] ", "", text).partition(". This is typically")[0][:200]


class Exchange:
    """Adds up the ranks' rows and their parts of the sample in one all-reduce on the host.

    It runs over a gloo group of its own, whatever the run's backend: on an accelerator the numbers have come to the
    host anyway, nothing on the device waits, and an error is an exception here rather than an aborted process.

    Args:
        group: the ranks that train together; None means all.
        timeout: seconds after which a silent rank counts as lost.

    Raises:
        ValueError: `timeout` is not > 0.

    Every rank must construct it, in the same order as other groups: making a group is itself a collective.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: float = 600.0) -> None:
        if not timeout > 0:
            raise ValueError(f"collective_timeout: {timeout} must be > 0 seconds")
        self.timeout = timeout
        ranks = dist.get_process_group_ranks(group) if group is not None else None
        self._group = dist.new_group(ranks, timedelta(seconds=timeout), backend="gloo")
        self.rank, self.world = dist.get_rank(self._group), dist.get_world_size(self._group)
        self.seconds = 0.0
        """How long the latest collective took, waiting for slow ranks included."""

    def agree(self, settings: dict[str, Any]) -> None:
        """Checks that all ranks were set up alike.

        Raises:
            ValueError: on every rank, naming the setting that differs.
            PeerLostError: a rank did not answer.
        """
        gathered: list[dict[str, Any]] = [{}] * self.world
        try:
            dist.all_gather_object(gathered, settings, group=self._group)
        except RuntimeError as e:
            raise self._lost("setting up", e) from e
        for key in settings:
            values = [other.get(key) for other in gathered]
            if any(value != values[0] for value in values):
                raise ValueError(f"{key}: the ranks differ ({values}); accepted: the same on every rank")

    def __call__(self, row: Vector, sample: Vector, step: int) -> tuple[Vector, Vector]:
        """All ranks' rows, shape (world, len(row)), and the sum of their samples.

        Args:
            row: this rank's own numbers; same length everywhere.
            sample: this rank's elements in their places, zeros elsewhere; same length everywhere.
            step: for the error message.

        Raises:
            PeerLostError: a rank is gone, or silent for `timeout` seconds.
        """
        start = time.perf_counter()
        table = np.zeros((self.world, row.size), np.float32)
        table[self.rank] = row
        buffer = torch.from_numpy(np.concatenate([table.reshape(-1), sample]))
        try:
            dist.all_reduce(buffer, group=self._group)
        except RuntimeError as e:
            raise self._lost(f"step {step}", e) from e
        self.seconds = time.perf_counter() - start
        joined = buffer.numpy()
        return joined[: table.size].reshape(table.shape), joined[table.size :]

    def _lost(self, when: str, error: Exception) -> PeerLostError:
        return PeerLostError(
            f"governance at {when}: a rank is gone, or was silent for {self.timeout:g} s; rank {self.rank} of "
            f"{self.world} stops here, since ranks that decide apart drift apart ({reason_of(error)})"
        )

    def close(self) -> None:
        """Gives the group up."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None


def exchange_for(group: dist.ProcessGroup | None, timeout: float) -> Exchange | None:
    """An exchange over the ranks of `group`, or of the default group; None for a process that trains alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return Exchange(group, timeout) if dist.get_world_size(group) > 1 else None
