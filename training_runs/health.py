"""Whether a run is in a state that a resume may start from."""

from __future__ import annotations

import math

import torch

from lbw_rl.envs.parallel import own_part
from lbw_rl.envs.task import TrainingTask
from lbw_rl.governor import Governor
from lbw_rl.last_good import HEALTHY_REGIMES

# What the shipped controllers call a run in trouble. Names that only their controller understands do not count, or
# a run under it would never be checkpointed; "fault" and "suspended" speak of the governance, not of the run.
ALARMS = (
    frozenset(
        {"non-finite", "gradient-burst", "bad-batch", "diverged", "loss-spike", "overshoot", "safe-mode", "out-of-band"}
    )
    - HEALTHY_REGIMES
)
"""Regimes in which no checkpoint is written."""


def unhealthy(task: TrainingTask, governor: Governor, loss: float) -> str | None:
    """Why the present state must not be what a resume starts from, or None; the same on all ranks, which all ask.

    Args:
        task: what is trained.
        governor: that governs it.
        loss: of the latest step, nats per token.
    """
    # One rank's shards may be bad alone.
    return next((reason for reason in task.ranks.everybodys(_here(task, governor, loss)) if reason is not None), None)


def _here(task: TrainingTask, governor: Governor, loss: float) -> str | None:
    if not math.isfinite(loss):
        return f"the training loss is {loss}"
    sums = [own_part(p.detach()).sum(dtype=torch.float32) for p in task.model.parameters()]
    if not torch.stack(sums).isfinite().all():
        return "a weight is not finite"
    regime = governor.last_ruling.action.regime
    return f"the controller sees {regime!r}" if governor.mode != "off" and regime in ALARMS else None
