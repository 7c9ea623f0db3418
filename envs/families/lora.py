"""LoRA on a frozen, pretrained mini transformer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lbw_rl.envs.families.family import linear, token_losses
from lbw_rl.envs.families.transformer import FleetShape
from lbw_rl.envs.fleet import Fleet
from lbw_rl.envs.languages import TRAINING_SHARE, python_docs
from lbw_rl.envs.proxy_data import BatchShape, token_data
from lbw_rl.envs.tasks import Tasks

_PRETRAINING_SEED = 0
_SEQUENCES, _LENGTH = 16, 32  # of a pretraining batch


@dataclass(frozen=True, slots=True)
class LoRAShape:
    """Low-rank adapters on every projection of a transformer that all models of a fleet share (Hu et al. 2106.09685).

    Attributes:
        base: the transformer. It is pretrained once a process, on the characters of Python's documentation, and frozen.
        rank: of an adapter.
        alpha: the adapter's output is multiplied by `alpha` / `rank`.
        pretraining_steps: of AdamW under a cosine schedule, from the base's own tuned learning rate.
    """

    base: FleetShape = field(default_factory=FleetShape)
    rank: int = 4
    alpha: float = 8.0
    pretraining_steps: int = 300

    @property
    def vocab(self) -> int:
        """Number of distinct tokens."""
        return self.base.vocab

    @property
    def name(self) -> str:
        """ "lora"."""
        return "lora"

    @property
    def tuned_lr(self) -> float:
        """Best constant-error learning rate of the default shape."""
        return 2e-2

    def parameters(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """A (rank, in) and B (out, rank) of every projection."""
        for name, (rows, columns) in self.base.projections():
            yield f"{name}.a", (self.rank, columns)
            yield f"{name}.b", (rows, self.rank)

    def draw(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """A from uniform(±in^−½), as peft starts it; B at 0, so that a model starts as the pretrained one."""
        parts = []
        for name, shape in self.parameters():
            if name.endswith(".b"):
                parts.append(np.zeros(shape, dtype=np.float32))
            else:
                parts.append((2.0 * rng.random(shape, dtype=np.float32) - 1.0) / np.float32(shape[1] ** 0.5))
        return np.concatenate([part.ravel() for part in parts])

    def data(self, task: Tasks, steps: int, batch: BatchShape, text: Path | None) -> tuple[Tensor, Tensor]:
        """Tokens of a single task; see `Family.data`."""
        return token_data(task, steps, batch, self.vocab, text)

    def losses(self, weights: Mapping[str, Tensor], batch: Tensor) -> Tensor:
        """Mean cross-entropy of each model in nats per token, shape (n,); see `Family.losses`."""
        frozen = {name: value.expand(len(batch), *value.shape[1:]) for name, value in pretrained(self).items()}
        scale = self.alpha / self.rank

        def project(x: Tensor, name: str) -> Tensor:
            y = linear(linear(x, weights[f"{name}.a"]), weights[f"{name}.b"])
            return torch.add(linear(x, frozen[name]), y, alpha=scale)

        return token_losses(self.base.logits(frozen, batch[:, :, :-1], project), batch[:, :, 1:])


@cache
@torch.enable_grad()
def pretrained(shape: LoRAShape) -> dict[str, Tensor]:
    """The base model's frozen weights, name → shape (1, …); it never sees the text that is held out."""
    rng, steps = np.random.default_rng(_PRETRAINING_SEED), shape.pretraining_steps
    fleet, text, one = Fleet(1, shape.base), python_docs(shape.vocab), np.ones(1)
    fleet.reset([0], [rng])
    last = int(TRAINING_SHARE * len(text)) - _LENGTH
    for step in range(steps):
        starts = rng.integers(0, last, _SEQUENCES)
        tokens = torch.from_numpy(text[starts[:, None] + np.arange(_LENGTH + 1)])
        fleet.backward(tokens[None])
        lr = shape.base.tuned_lr * 0.5 * (1.0 + np.cos(np.pi * step / steps))
        fleet.step(lr * one, 0.9 * one, 0.99 * one, clip=one)
    return {name: value.detach().clone() for name, value in fleet.named_parameters()}
