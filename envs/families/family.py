"""What a fleet asks of a family of models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lbw_rl.envs.proxy_data import BatchShape
from lbw_rl.envs.tasks import Tasks


class Family(Protocol):
    """One architecture, as pure functions of weights with a leading model axis; a frozen dataclass, so hashable."""

    @property
    def name(self) -> str:
        """One of `lbw_rl.envs.tasks.MODELS`."""
        ...

    @property
    def tuned_lr(self) -> float:
        """Best constant-error learning rate of the default shape (`lbw_rl.training_runs.benchmarks.proxy_lr`)."""
        ...

    def parameters(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every parameter of one model, those of two dimensions (matrices) first."""
        ...

    def draw(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Initial weights of one model, in the order of `parameters`, shape (size,)."""
        ...

    def data(self, task: Tasks, steps: int, batch: BatchShape, text: Path | None) -> tuple[Tensor, Tensor]:
        """Data of a single task, label noise and corrupted batches included.

        Args:
            task: the task, of length 1.
            steps: training batches.
            batch: their sizes.
            text: file of the corpus "file".

        Returns:
            Training data, shape (steps, …), and held-out data, (…), as `losses` takes them.
        """
        ...

    def losses(self, weights: Mapping[str, Tensor], batch: Tensor) -> Tensor:
        """Mean loss of each model on its own batch.

        Args:
            weights: name → shape (n, …), as `parameters` lists them.
            batch: shape (n, …): for language models tokens, int64, shape (n, sequences, length + 1), where position
                t predicts position t + 1; for quadratics the displacement of the minimum.

        Returns:
            Shape (n,).
        """
        ...


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (n, rows, in) times weight (n, out, in), transposed."""
    return torch.bmm(x, weight.transpose(1, 2))


def embed(tokens: Tensor, table: Tensor) -> Tensor:
    """Each model's own embeddings.

    Args:
        tokens: int64, shape (n, …).
        table: shape (n, vocab, width).

    Returns:
        Shape (n, tokens of a model, width).
    """
    n, vocab, width = table.shape
    rows = tokens.reshape(n, -1) + torch.arange(n)[:, None] * vocab
    return torch.nn.functional.embedding(rows, table.reshape(n * vocab, width))


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of each model in nats per token.

    Args:
        logits: shape (n, rows, vocab).
        targets: int64, shape (n, …) of `rows` each.

    Returns:
        Shape (n,).
    """
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.reshape(-1), reduction="none")
    return each.view(len(logits), -1).mean(1)
