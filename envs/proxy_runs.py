"""Training runs of a proxy fleet: tasks, their data, and the models that learn them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lbw_rl.actuator import scaled_decay
from lbw_rl.envs.fleet import Fleet, FleetShape, FloatArray
from lbw_rl.envs.tasks import Tasks, draw_tokens, sample_tasks

_LANGUAGE, _WEIGHTS = 0, 1  # streams of a task's seed


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What one step trains on: `sequences` of `length` tokens; `held_out` sequences are kept for evaluation."""

    sequences: int = 8
    length: int = 16
    held_out: int = 8


class ProxyData:
    """The tasks of `n` runs and their tokens; governed runs and base runs read the same one.

    Attributes:
        tasks: the tasks, n of them.
        batches: training tokens, int64, shape (n, steps + 1, sequences, length + 1).
        held_out: evaluation tokens, int64, shape (n, held_out, length + 1).
    """

    def __init__(self, n: int, steps: int, vocab: int, shape: BatchShape) -> None:
        self.shape, self.vocab = shape, vocab
        self.tasks = sample_tasks(np.random.default_rng(0), n)
        self.batches = torch.zeros(n, steps + 1, shape.sequences, shape.length + 1, dtype=torch.long)
        self.held_out = torch.zeros(n, shape.held_out, shape.length + 1, dtype=torch.long)

    def put(self, rows: Sequence[int], tasks: Tasks) -> None:
        """Gives the runs in `rows` new tasks and draws their tokens.

        Raises:
            ValueError: a horizon longer than the buffer.
        """
        steps = self.batches.shape[1] - 1
        if tasks.horizon.max() > steps:
            raise ValueError(f"tasks.horizon {tasks.horizon.max()} exceeds the {steps} steps that data is kept for")
        for i, row in enumerate(rows):
            self.tasks.put(row, tasks.take(np.array([i])))
            rng = np.random.default_rng([int(tasks.seed[i]), _LANGUAGE])
            needed = int(tasks.horizon[i]) + 1  # one more batch for the last observation
            train, test = draw_tokens(
                int(tasks.corpus[i]),
                rng,
                needed * self.shape.sequences,
                self.shape.held_out,
                self.shape.length + 1,
                self.vocab,
            )
            self.batches[row, :needed] = torch.from_numpy(train).view(needed, self.shape.sequences, -1)
            self.held_out[row] = torch.from_numpy(test)


class ProxyRuns:
    """One run per task of `data`, each at its own step, all advanced together.

    A run's gradient of the step at hand is always there (`fleet.grads`, `losses`), as it is in a training loop
    between `backward` and `step`.
    """

    def __init__(self, data: ProxyData, shape: FleetShape) -> None:
        n = len(data.tasks)
        self.data = data
        self.fleet = Fleet(n, shape)
        self.step = np.zeros(n, dtype=np.int64)
        self.losses = np.zeros(n)

    def start(self, rows: Sequence[int]) -> None:
        """Starts the runs in `rows` from their tasks' weights; the others stay where they are."""
        seeds = self.data.tasks.seed[list(rows)]
        self.fleet.reset(rows, [np.random.default_rng([int(seed), _WEIGHTS]) for seed in seeds])
        self.step[list(rows)] = 0
        if len(rows) == self.fleet.n:
            self.losses = self.fleet.backward(self._batch())
        else:
            part = self.fleet.copy(rows)
            self.losses[list(rows)] = part.backward(self._batch(rows))
            self.fleet.paste_grads(rows, part)

    def _batch(self, rows: Sequence[int] | None = None) -> Tensor:
        index = np.arange(self.fleet.n) if rows is None else np.asarray(rows)
        return self.data.batches[index, self.step[index]]

    def learning_rate(self) -> FloatArray:
        """Scheduled learning rate of the step at hand, shape (n,)."""
        return self.data.tasks.learning_rate(self.step)

    def update(self, lr_scale: FloatArray, momentum_scale: FloatArray) -> None:
        """One optimizer step at the given multiples of the schedule, shape (n,) each."""
        tasks = self.data.tasks
        self.fleet.step(
            self.learning_rate() * lr_scale,
            np.array([scaled_decay(b, s) for b, s in zip(tasks.beta1, momentum_scale, strict=True)]),
            tasks.beta2,
            weight_decay=tasks.weight_decay,
            clip=tasks.clip,
        )
        self.step += 1

    def backward(self) -> None:
        """The gradient of the next batch."""
        self.losses = self.fleet.backward(self._batch())

    def held_out_losses(self, rows: Sequence[int] | None = None) -> FloatArray:
        """Mean nats per token on each task's held-out tokens, shape (n,) or (len(rows),)."""
        if rows is None or len(rows) == self.fleet.n:
            return self.fleet.evaluate(self.data.held_out)
        return self.fleet.copy(rows).evaluate(self.data.held_out[torch.as_tensor(rows, dtype=torch.long)])

    def left_alone(self, rows: Sequence[int]) -> FloatArray:
        """Held-out losses at which the runs in `rows` would end on their own schedules; nothing here moves.

        Returns:
            Shape (len(rows),).
        """
        index = np.asarray(rows)
        tasks, step, fleet = self.data.tasks.take(index), self.step[index].copy(), self.fleet.copy(rows)
        while (running := step < tasks.horizon).any():
            lr = np.where(running, tasks.learning_rate(step), 0.0)
            fleet.step(lr, tasks.beta1, tasks.beta2, weight_decay=tasks.weight_decay, clip=tasks.clip)
            step += running
            fleet.backward(self.data.batches[index, step])
        return fleet.evaluate(self.data.held_out[torch.from_numpy(index)])
