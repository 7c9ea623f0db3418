"""Training runs of a proxy fleet: tasks, their data, and the models that learn them."""

from __future__ import annotations

import copy
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
        self.losses = self.fleet.backward(self._batch())

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
