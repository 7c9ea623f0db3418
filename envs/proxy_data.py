"""What proxies of language models are trained on and judged by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lbw_rl.envs.languages import CORPORA, draw_tokens
from lbw_rl.envs.tasks import LANGUAGE, NOISE, Tasks


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What one step trains on: `sequences` of `length` tokens; `held_out` sequences are kept for evaluation."""

    sequences: int = 8
    length: int = 16
    held_out: int = 8

    def distinct(self, task: Tasks) -> int:
        """Sequences of a step that differ from one another under a single task's `batch`: a divisor of `sequences`."""
        most = max(1.0, float(task.batch[0]) * self.sequences)
        return max(k for k in range(1, self.sequences + 1) if self.sequences % k == 0 and k <= most)


def token_data(task: Tasks, steps: int, batch: BatchShape, vocab: int, text: Path | None) -> tuple[Tensor, Tensor]:
    """Tokens of a single task.

    A smaller batch is repeated until it fills the shape, which leaves its mean loss and gradient what they were.
    Label noise and corrupted batches replace training tokens by uniform ones; the others are those of the sound task.

    Args:
        task: the task.
        steps: training batches.
        batch: sizes.
        vocab: number of distinct tokens.
        text: file of the corpus "file".

    Returns:
        int64, shape (steps, sequences, length + 1) and (held_out, length + 1).
    """
    distinct, length = batch.distinct(task), batch.length + 1
    corpus, rng = CORPORA[int(task.corpus[0])], task.generator(0, LANGUAGE)
    train, held_out = draw_tokens(corpus, rng, steps * distinct, batch.held_out, length, vocab, text)
    train = train.reshape(steps, distinct, length)
    noise = task.generator(0, NOISE)
    share = np.where(task.has("corrupted-batches", np.arange(steps)), 1.0, task.label_noise)
    if share.any():
        replaced = noise.random(train.shape) < share[:, None, None]
        train = np.where(replaced, noise.integers(0, vocab, train.shape), train)
    return torch.from_numpy(train).repeat(1, batch.sequences // distinct, 1), torch.from_numpy(held_out)
