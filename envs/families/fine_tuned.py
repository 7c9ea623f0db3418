"""All parameters of a pretrained mini transformer, trained further."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lbw_rl.envs.families.pretraining import pretrained
from lbw_rl.envs.families.transformer import FleetShape
from lbw_rl.envs.proxy_data import BatchShape
from lbw_rl.envs.tasks import Tasks


@dataclass(frozen=True, slots=True)
class FineTunedShape:
    """A transformer that starts from pretrained weights, the same for all models of a fleet, and trains all of them.

    Attributes:
        base: the transformer; it is pretrained once a process (`lbw_rl.envs.families.pretraining`).
        pretraining_steps: of the base.
    """

    base: FleetShape = field(default_factory=FleetShape)
    pretraining_steps: int = 300

    @property
    def vocab(self) -> int:
        """Number of distinct tokens."""
        return self.base.vocab

    @property
    def name(self) -> str:
        """ "fine-tuned"."""
        return "fine-tuned"

    @property
    def tuned_lr(self) -> float:
        """Best constant-error learning rate of the default shape."""
        return 2e-2

    def parameters(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Those of the base."""
        return self.base.parameters()

    def draw(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """The pretrained weights, whatever `rng` is."""
        return np.concatenate(
            [value.numpy().ravel() for value in pretrained(self.base, self.pretraining_steps).values()]
        )

    def data(self, task: Tasks, steps: int, batch: BatchShape, text: Path | None) -> tuple[Tensor, Tensor]:
        """Tokens of a single task; see `Family.data`."""
        return self.base.data(task, steps, batch, text)

    def losses(self, weights: Mapping[str, Tensor], batch: Tensor) -> Tensor:
        """Mean cross-entropy of each model in nats per token, shape (n,); see `Family.losses`."""
        return self.base.losses(weights, batch)
