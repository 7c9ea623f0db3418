"""Training runs of a proxy fleet: tasks, their data, and the models that learn them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lbw_rl.actuator import scaled_decay
from lbw_rl.envs.families.family import Family
from lbw_rl.envs.fleet import Fleet, FloatArray
from lbw_rl.envs.proxy_data import BatchShape
from lbw_rl.envs.tasks import MODELS, WEIGHTS, IntArray, Tasks, sample_tasks

__all__ = ["BatchShape", "ProxyData", "ProxyRuns"]


class ProxyData:
    """The tasks of `n` runs and their data; governed runs and base runs read the same one.

    Args:
        n: number of runs.
        steps: longest run.
        family: of the runs' models.
        shape: sizes of the batches.
        text: file of the corpus "file".

    Attributes:
        tasks: the tasks, n of them.
        batches: training data, shape (n, steps + 1, …); `Family.losses` takes one step of it.
        held_out: evaluation data, shape (n, …).
    """

    def __init__(self, n: int, steps: int, family: Family, shape: BatchShape, text: Path | None = None) -> None:
        self.family, self.shape, self.text = family, shape, text
        self.tasks = sample_tasks(np.random.default_rng(0), n, model=family.name)
        train, held_out = family.data(self.tasks.take(np.array([0])), 1, shape, None)
        self.batches = train.new_zeros(n, steps + 1, *train.shape[1:])
        self.held_out = held_out.new_zeros(n, *held_out.shape)

    def put(self, rows: Sequence[int], tasks: Tasks) -> None:
        """Gives the runs in `rows` new tasks and draws their data.

        Raises:
            ValueError: a horizon longer than the buffer, or tasks of another family.
        """
        steps = self.batches.shape[1] - 1
        if tasks.horizon.max() > steps:
            raise ValueError(f"tasks.horizon {tasks.horizon.max()} exceeds the {steps} steps that data is kept for")
        if (tasks.model != MODELS.index(self.family.name)).any():
            raise ValueError(f"tasks.model {tasks.model} must be {MODELS.index(self.family.name)} ({self.family.name})")
        for i, row in enumerate(rows):
            task = tasks.take(np.array([i]))
            self.tasks.put(row, task)
            needed = int(task.horizon[0]) + 1  # one more batch for the last observation
            self.batches[row, :needed], self.held_out[row] = self.family.data(task, needed, self.shape, self.text)

    def take(self, rows: Sequence[int]) -> ProxyData:
        """Tasks and tokens of `rows`, copied."""
        part = copy.copy(self)
        index = torch.as_tensor(rows, dtype=torch.long)
        part.tasks, part.batches, part.held_out = (
            self.tasks.take(np.asarray(rows)),
            self.batches[index],
            self.held_out[index],
        )
        return part


class ProxyRuns:
    """One run per task of `data`, each at its own step, all advanced together.

    A run's gradient of the step at hand is always there (`fleet.grads`, `losses`), as it is in a training loop
    between `backward` and `step`.
    """

    def __init__(self, data: ProxyData) -> None:
        n = len(data.tasks)
        self.data = data
        self.fleet = Fleet(n, data.family)
        self.step = np.zeros(n, dtype=np.int64)
        self.losses = np.zeros(n)

    def start(self, rows: Sequence[int]) -> None:
        """Starts the runs in `rows` from their tasks' weights; the others stay where they are."""
        tasks = self.data.tasks
        self.fleet.reset(rows, [tasks.generator(row, WEIGHTS) for row in rows], tasks.init_scale[list(rows)])
        self.step[list(rows)] = 0  # where no task has a fault yet
        if len(rows) == self.fleet.n:
            self.losses = self.fleet.backward(self._batch())
        else:
            part = self.fleet.copy(rows)
            self.losses[list(rows)] = part.backward(self._batch(rows))
            self.fleet.paste_grads(rows, part)

    def _batch(self, rows: Sequence[int] | None = None) -> Tensor:
        index = np.arange(self.fleet.n) if rows is None else np.asarray(rows)
        # A run that has ended while others go on reads its last batch again and again; nobody asks for what it makes of it.
        return self.data.batches[index, np.minimum(self.step, self.data.tasks.horizon)[index]]

    def learning_rate(self) -> FloatArray:
        """Scheduled learning rate of the step at hand, shape (n,)."""
        return self.data.tasks.learning_rate(self.step)

    def update(self, lr_scale: FloatArray, momentum_scale: FloatArray, skipped: Sequence[int] = ()) -> None:
        """One optimizer step at the given multiples of the schedule, shape (n,) each.

        Weights, moments and step counts of the runs in `skipped` stay as they are; their batch is gone.
        """
        tasks = self.data.tasks
        kept = self.fleet.copy(skipped) if skipped else None
        self.fleet.step(
            self.learning_rate() * lr_scale,
            np.array([scaled_decay(b, s) for b, s in zip(tasks.beta1, momentum_scale, strict=True)]),
            tasks.beta2,
            weight_decay=tasks.weight_decay,
            clip=tasks.clip,
        )
        if kept is not None:
            self.fleet.paste(skipped, kept)
        self.step += 1

    def backward(self) -> None:
        """The gradient of the next batch."""
        self.losses = _backward(self.fleet, self._batch(), self.data.tasks, self.step)

    def held_out_losses(self, rows: Sequence[int] | None = None) -> FloatArray:
        """Mean nats per token on each task's held-out tokens, shape (n,) or (len(rows),)."""
        if rows is None or len(rows) == self.fleet.n:
            return self.fleet.evaluate(self.data.held_out)
        return self.fleet.copy(rows).evaluate(self.data.held_out[torch.as_tensor(rows, dtype=torch.long)])

    def take(self, rows: Sequence[int]) -> ProxyRuns:
        """The runs in `rows`, copied: what is done to the copy does not show here."""
        part = copy.copy(self)
        part.data, part.fleet = self.data.take(rows), self.fleet.copy(rows)
        part.step, part.losses = self.step[list(rows)].copy(), self.losses[list(rows)].copy()
        return part


def _backward(fleet: Fleet, batch: Tensor, tasks: Tasks, step: IntArray) -> FloatArray:
    """Gradients and losses of the step at hand, bursts included."""
    losses = fleet.backward(batch)
    factor = tasks.gradient_factor(step)
    if (burst := np.flatnonzero(factor != 1.0)).size:
        fleet.grads[torch.from_numpy(burst)] *= torch.from_numpy(factor[burst].astype(np.float32))[:, None]
    return losses
