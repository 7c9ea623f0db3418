"""The neural n-gram language model of Bengio et al. (2003): embeddings of the last tokens, one tanh layer, softmax."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lbw_rl.envs.families.family import embed, token_losses
from lbw_rl.envs.proxy_data import BatchShape, token_data
from lbw_rl.envs.tasks import Tasks


@dataclass(frozen=True, slots=True)
class NGramShape:
    """An n-gram MLP that all models of a fleet share.

    Attributes:
        vocab: number of distinct tokens.
        context: tokens that a prediction sees, n − 1 of the n-gram.
        width: of an embedding.
        hidden: units of the tanh layer.
    """

    vocab: int = 64
    context: int = 3
    width: int = 16
    hidden: int = 96

    @property
    def name(self) -> str:
        """ "ngram"."""
        return "ngram"

    @property
    def tuned_lr(self) -> float:
        """Best constant-error learning rate of the default shape."""
        return 2e-2

    def _matrices(self) -> dict[str, tuple[int, int]]:
        return {
            "embed": (self.vocab, self.width),
            "hidden": (self.hidden, self.context * self.width),
            "output": (self.vocab, self.hidden),
        }

    def parameters(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every parameter of one model, matrices first."""
        yield from self._matrices().items()
        yield "hidden_bias", (self.hidden,)
        yield "output_bias", (self.vocab,)

    def draw(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Embeddings from normal(0, 1), the other matrices from normal(0, 1 / inputs), biases at 0."""
        parts = [
            rng.standard_normal(prod(shape), dtype=np.float32) / np.float32(1 if name == "embed" else shape[1] ** 0.5)
            for name, shape in self._matrices().items()
        ]
        return np.concatenate([*parts, np.zeros(self.hidden + self.vocab, dtype=np.float32)])

    def data(self, task: Tasks, steps: int, batch: BatchShape, text: Path | None) -> tuple[Tensor, Tensor]:
        """Tokens of a single task; see `Family.data`."""
        return token_data(task, steps, batch, self.vocab, text)

    def losses(self, weights: Mapping[str, Tensor], batch: Tensor) -> Tensor:
        """Mean cross-entropy of each model over the tokens that have a whole context; see `Family.losses`."""
        n = len(batch)
        contexts = batch[:, :, :-1].unfold(-1, self.context, 1)
        x = embed(contexts, weights["embed"]).view(n, -1, self.context * self.width)
        h = torch.tanh(torch.baddbmm(weights["hidden_bias"][:, None, :], x, weights["hidden"].transpose(1, 2)))
        logits = torch.baddbmm(weights["output_bias"][:, None, :], h, weights["output"].transpose(1, 2))
        return token_losses(logits, batch[:, :, self.context :])
