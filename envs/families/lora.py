"""LoRA on a frozen, pretrained mini transformer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lbw_rl.envs.families.family import linear, token_losses
from lbw_rl.envs.families.pretraining import pretrained
from lbw_rl.envs.families.transformer import FleetShape
from lbw_rl.envs.proxy_data import BatchShape, token_data
from lbw_rl.envs.tasks import Tasks


@dataclass(frozen=True, slots=True)
class LoRAShape:
    """Low-rank adapters on every projection of a transformer that all models of a fleet share (Hu et al. 2106.09685).

    Attributes:
        base: the transformer; it is pretrained once a process (`lbw_rl.envs.families.pretraining`), and frozen.
        rank: of an adapter.
        alpha: the adapter's output is multiplied by `alpha` / `rank`.
        pretraining_steps: of the base.
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
        frozen = {
            name: value.expand(len(batch), *value.shape[1:])
            for name, value in pretrained(self.base, self.pretraining_steps).items()
        }
        scale = self.alpha / self.rank

        def project(x: Tensor, name: str) -> Tensor:
            y = linear(linear(x, weights[f"{name}.a"]), weights[f"{name}.b"])
            return torch.add(linear(x, frozen[name]), y, alpha=scale)

        return token_losses(self.base.logits(frozen, batch[:, :, :-1], project), batch[:, :, 1:])
