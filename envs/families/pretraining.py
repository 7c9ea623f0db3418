"""The pretrained weights that proxies of fine-tuning start from."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from lbw_rl.envs.families.transformer import FleetShape
from lbw_rl.envs.fleet import Fleet
from lbw_rl.envs.languages import TRAINING_SHARE, python_docs

_SEED = 0
_SEQUENCES, _LENGTH = 16, 32  # of a batch


@cache
@torch.enable_grad()
def pretrained(shape: FleetShape, steps: int) -> dict[str, Tensor]:
    """Weights of a transformer trained on the characters of Python's documentation; it never sees the text that is held out.

    AdamW for `steps` steps under a cosine schedule, from the shape's tuned learning rate; once a process.

    Returns:
        Name → shape (1, …), in the order of `FleetShape.parameters`.
    """
    rng = np.random.default_rng(_SEED)
    fleet, text, one = Fleet(1, shape), python_docs(shape.vocab), np.ones(1)
    fleet.reset([0], [rng])
    last = int(TRAINING_SHARE * len(text)) - _LENGTH
    for step in range(steps):
        starts = rng.integers(0, last, _SEQUENCES)
        tokens = torch.from_numpy(text[starts[:, None] + np.arange(_LENGTH + 1)])
        fleet.backward(tokens[None])
        lr = shape.tuned_lr * 0.5 * (1.0 + np.cos(np.pi * step / steps))
        fleet.step(lr * one, 0.9 * one, 0.99 * one, clip=one)
    return {name: value.detach().clone() for name, value in fleet.named_parameters()}
