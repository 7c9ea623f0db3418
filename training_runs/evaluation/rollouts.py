"""How controllers, and optimizers tuned for the task, end the runs of a tier."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbw_rl.authority import Authority
from lbw_rl.controller import Controller
from lbw_rl.envs.held_out_gain import DivergenceWatch
from lbw_rl.envs.interface import DEFAULT_AUTHORITY
from lbw_rl.envs.mixture import ProxyKind
from lbw_rl.envs.proxy_runs import ProxyData, ProxyRuns
from lbw_rl.envs.schedule_free import schedule_free_losses
from lbw_rl.envs.tasks import SCHEDULES, Tasks
from lbw_rl.registry import load_controller
from lbw_rl.training_runs.evaluation.tiers import MULTIPLIERS, SEEDS, Tier

FloatArray = NDArray[np.float64]

LOOK_EVERY = 2
"""Steps between two looks at the held-out loss, which tell whether a run has diverged."""
RATES = tuple(3.0**k for k in range(-3, 4))
"""Multiples of a family's tuned rate that a search begins with."""
FINER = (3.0**-0.5, 3.0**-0.25, 1.0, 3.0**0.25, 3.0**0.5)
"""Multiples of the best of those that it ends with, on all seeds."""


@dataclass(frozen=True, slots=True)
class Ends:
    """How N runs ended; shape (N,) each.

    Attributes:
        losses: final held-out losses, nats per token; of a diverged run its initial one, which none exceeds.
        diverged: which diverged.
        scales: log of the executed learning-rate scale at 20 moments of each run, shape (N, 20).
    """

    losses: FloatArray
    diverged: NDArray[np.bool_]
    scales: FloatArray


MOMENTS = 20


def governed(
    kind: ProxyKind, tasks: Tasks, controller: str | Path | Controller, authority: Authority = DEFAULT_AUTHORITY
) -> Ends:
    """The runs of `tasks` under copies of a controller, all at once; it decides at every step, or as often as it was made for.

    Args:
        kind: of the tasks' proxies.
        tasks: N of them.
        controller: name, folder of a frozen policy, or object.
        authority: what its actions are held to.
    """
    n, one = len(tasks), load_controller(controller)
    decide_every = max(LOOK_EVERY, one.decide_every or 1)
    env = kind.fleet(n, authority=authority, decide_every=decide_every, base_run=False, rule=one)
    _, info = env.reset(seed=0, options={"tasks": tasks})
    losses, diverged, running = info["initial_loss"].copy(), np.zeros(n, dtype=bool), np.ones(n, dtype=bool)
    scales, steps = np.zeros((n, MOMENTS)), np.zeros(n, dtype=np.int64)
    every = np.arange(n)
    while running.any():
        moment = np.minimum(MOMENTS - 1, steps * MOMENTS // tasks.horizon)
        _, _, terminated, truncated, info = env.step(np.zeros((n, 2), dtype=np.float32))
        steps += decide_every
        done = (terminated | truncated) & running
        executed = np.where(done, info["final_info"]["lr_scale"], info["lr_scale"]) if done.any() else info["lr_scale"]
        scales[every[running], moment[running]] = np.log(executed[running])
        if done.any():
            final = info["final_info"]
            losses[done] = (final["initial_loss"] - final["gain"])[done]
            diverged |= done & terminated
            running &= ~done
    env.close()
    return Ends(losses, diverged, scales)


def tuned_adamw(tier: Tier) -> tuple[Ends, list[dict[str, float | str]]]:
    """AdamW at the best of all schedules and rates for each task, whatever rate the task itself has.

    `RATES` × every schedule on the first seed, then `FINER` rates of the best schedule on all: what is best in the mean over
    seeds on the very runs that it is judged on stands for the task, so that it is rather too good than too bad.

    Returns:
        How the tier's runs end, the same at every multiplier, and each task's schedule and rate (as a multiple of the family's).
    """
    tasks = tier.draw()
    first = tasks.take(np.arange(tier.tasks) * len(MULTIPLIERS) * SEEDS)
    candidates = [(s, r) for s in range(len(SCHEDULES)) for r in RATES]
    losses = np.stack([ungoverned(_data(tier.kind, _at(first, r, s)))[0] for s, r in candidates])
    best = [candidates[i] for i in losses.argmin(axis=0)]
    schedules, rates = np.array([s for s, _ in best]), np.array([r for _, r in best])
    return _refined(tier, rates, schedules)


def tuned_schedule_free(tier: Tier) -> tuple[Ends, list[dict[str, float | str]]]:
    """Schedule-Free AdamW (Defazio et al. 2405.15682) at the best rate for each task, found as `tuned_adamw` finds its own."""
    first = tier.draw().take(np.arange(tier.tasks) * len(MULTIPLIERS) * SEEDS)
    losses = np.stack([schedule_free_losses(_data(tier.kind, _at(first, r)))[0] for r in RATES])
    return _refined(tier, np.array(RATES)[losses.argmin(axis=0)], None)


def _refined(
    tier: Tier, rates: FloatArray, schedules: NDArray[np.int64] | None
) -> tuple[Ends, list[dict[str, float | str]]]:
    """The best of `FINER` multiples of each task's rate, in the mean over its seeds."""
    of_tasks = np.arange(tier.tasks * SEEDS) // SEEDS
    seeds = tier.draw().take((of_tasks * len(MULTIPLIERS)) * SEEDS + np.arange(tier.tasks * SEEDS) % SEEDS)
    losses, lost = [], []
    for finer in FINER:
        rate = (rates * finer)[of_tasks]
        if schedules is None:
            ends = schedule_free_losses(_data(tier.kind, _at(seeds, rate)))
        else:
            ends = ungoverned(_data(tier.kind, _at(seeds, rate, schedules[of_tasks])))
        losses.append(ends[0].reshape(tier.tasks, SEEDS))
        lost.append(ends[1].reshape(tier.tasks, SEEDS))
    chosen = np.stack(losses).mean(axis=2).argmin(axis=0)
    task = np.arange(tier.tasks)

    def spread(values: list[Any]) -> NDArray[Any]:  # the same at every multiplier, as the tier orders its runs
        return np.repeat(np.stack(values)[chosen, task][:, None, :], len(MULTIPLIERS), axis=1).reshape(-1)

    settings: list[dict[str, float | str]] = [
        {
            "rate": float(rates[t] * FINER[chosen[t]]),
            "schedule": "none" if schedules is None else SCHEDULES[schedules[t]],
        }
        for t in task
    ]
    n = tier.tasks * len(MULTIPLIERS) * SEEDS
    return Ends(spread(losses), spread(lost), np.zeros((n, MOMENTS))), settings


def ungoverned(data: ProxyData) -> tuple[FloatArray, NDArray[np.bool_]]:
    """The tasks of `data` under AdamW alone, with no signal measured.

    Returns:
        Final held-out losses and which runs diverged, as `governed` would find them under the controller "constant".
    """
    runs, watch = ProxyRuns(data), DivergenceWatch(len(data.tasks))
    runs.start(range(len(data.tasks)))
    alone = np.ones(len(data.tasks))
    initial = runs.held_out_losses()
    losses, lost = initial.copy(), np.zeros(len(data.tasks), dtype=bool)
    while (running := (runs.step < data.tasks.horizon) & ~lost).any():
        for _ in range(LOOK_EVERY):
            runs.update(alone, alone)
            runs.backward()
        now = runs.held_out_losses()
        lost |= watch(runs.losses, now, initial) & running
        losses = np.where(running, np.fmin(now, initial), losses)
    return np.where(lost, initial, losses), lost


def _at(tasks: Tasks, rate: FloatArray | float, schedule: NDArray[np.int64] | int | None = None) -> Tasks:
    """The tasks with a rate of `rate` × their family's, whatever their error, and another schedule."""
    tuned = tasks.lr / tasks.lr_error
    changed = replace(tasks, lr=tuned * rate, lr_error=np.broadcast_to(rate, len(tasks)).astype(np.float64).copy())
    return changed if schedule is None else replace(changed, schedule=np.broadcast_to(schedule, len(tasks)).copy())


def _data(kind: ProxyKind, tasks: Tasks) -> ProxyData:
    data = ProxyData(len(tasks), int(tasks.horizon.max()), kind.shape, kind.batch)
    data.put(range(len(tasks)), tasks)
    return data


def open_loop(scales: FloatArray, tasks: Tasks) -> Controller:
    """The mean path of a controller at the right rate, replayed blind: what its feedback is worth.

    Args:
        scales: of its runs on `tasks`, shape (N, MOMENTS), logarithms.
        tasks: the tier's.
    """
    from lbw_rl.controllers.open_loop import OpenLoop

    right = np.isclose(tasks.lr_error, 1.0)
    return OpenLoop(scales=[math.exp(x) for x in scales[right].mean(axis=0)])
