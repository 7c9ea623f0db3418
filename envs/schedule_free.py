"""A fleet under Schedule-Free AdamW, a rival of governed runs."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lbw_rl.envs.fleet import FloatArray
from lbw_rl.envs.held_out_gain import DivergenceWatch
from lbw_rl.envs.proxy_runs import ProxyData, ProxyRuns


def schedule_free_losses(data: ProxyData, *, eps: float = 1e-8) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Trains the tasks of `data` with Schedule-Free AdamW, as `schedulefree.AdamWScheduleFree` defines it.

    Defazio et al. 2405.15682, algorithm 1 on AdamW's second moment: gradients at y = (1 − β1)·z + β1·x, steps on z, and x,
    the mean of the z weighted by the squared rates, is what is judged. Rates are the tasks' own after their warmup, without any
    schedule; the weight decay acts on y. Faults of the rate do not reach it, those of the data and the gradient do.

    Returns:
        Final held-out losses, nats per token, shape (n,), of a diverged run the initial one; and which diverged.
    """
    tasks, n = data.tasks, len(data.tasks)
    runs, watch, state = ProxyRuns(data), DivergenceWatch(n), _State(n)
    runs.start(range(n))
    state.z = runs.fleet.weights.clone()
    state.square = torch.zeros_like(state.z)
    initial = runs.held_out_losses()
    losses, lost = initial.copy(), np.zeros(n, dtype=bool)
    while (running := runs.step < tasks.horizon).any():
        _step(runs, state, eps)
        runs.step += 1
        now = _judged(runs, state)
        runs.backward()
        lost |= watch(runs.losses, now, initial) & running
        losses = np.where(running, now, losses)
    return np.where(lost | ~np.isfinite(losses), initial, np.minimum(losses, initial)), lost


class _State:
    """z and the second moment, shape (n, p), and what weighs the mean, shape (n,)."""

    z: torch.Tensor
    square: torch.Tensor

    def __init__(self, n: int) -> None:
        self.weight_sum, self.largest_rate = np.zeros(n), np.zeros(n)


@torch.no_grad()
def _step(runs: ProxyRuns, state: _State, eps: float) -> None:
    """One step of every run, from the gradient at y, which is where the fleet's weights are."""
    tasks, fleet, k = runs.data.tasks, runs.fleet, runs.step
    lr = tasks.lr * np.minimum(1.0, (k + 1) / np.maximum(1, tasks.warmup))
    state.largest_rate = np.maximum(state.largest_rate, lr)
    state.weight_sum += state.largest_rate**2
    share = _column(state.largest_rate**2 / state.weight_sum)
    if np.isfinite(tasks.clip).any():
        fleet.grads.mul_(_column(np.minimum(1.0, tasks.clip / (fleet.grad_norms() + 1e-6))))
    beta1, beta2 = _column(tasks.beta1), _column(tasks.beta2)
    state.square.mul_(beta2).addcmul_(fleet.grads, fleet.grads * (1 - beta2))
    step = fleet.grads / (state.square / _column(1.0 - tasks.beta2 ** (k + 1))).sqrt_().add_(eps)
    step.add_(fleet.weights * _column(tasks.weight_decay))
    rate = _column(lr)
    fleet.weights.lerp_(state.z, share).add_(step * (rate * (beta1 * (1 - share) - 1)))
    state.z.sub_(rate * step)


@torch.no_grad()
def _judged(runs: ProxyRuns, state: _State) -> FloatArray:
    """Held-out losses at x = y + (y − z)·(1/β1 − 1)."""
    weights = runs.fleet.weights
    y = weights.clone()
    weights.add_((weights - state.z) * _column(1.0 / runs.data.tasks.beta1 - 1.0))
    losses = runs.held_out_losses()
    weights.copy_(y)
    return losses


def _column(values: FloatArray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))[:, None]
