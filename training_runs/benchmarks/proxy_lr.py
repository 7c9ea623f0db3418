"""The learning-rate sweeps that the families' `tuned_lr` comes from.

```
python -m lbw_rl.training_runs.benchmarks.proxy_lr                        # the default proxy, several minutes of one core
python -m lbw_rl.training_runs.benchmarks.proxy_lr --family quadratic
```

It also shows the displacement of the runs, update_ratio · sqrt(steps), by which proxies and large runs are compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lbw_rl.envs.families.catalogue import FAMILIES, family
from lbw_rl.envs.families.family import Family
from lbw_rl.envs.fleet import FleetShape
from lbw_rl.envs.fleet_signals import FleetProbe
from lbw_rl.envs.languages import CORPORA
from lbw_rl.envs.proxy_runs import BatchShape, ProxyData, ProxyRuns
from lbw_rl.envs.tasks import SCHEDULES, TRAINING_CORPORA, sample_tasks

LEARNING_RATES = (1e-4, 1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 1e-1, 2e-1, 1.0)
MOMENTS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Shares of the run at which the displacement is read."""


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One learning rate under one schedule.

    Attributes:
        schedule: name of the schedule.
        learning_rate: its peak.
        loss: mean final held-out loss over corpora and seeds, each at most its initial value; nats per token.
        displacement: mean update_ratio · sqrt(steps) at `MOMENTS`.
    """

    schedule: str
    learning_rate: float
    loss: float
    displacement: tuple[float, ...]


def sweep(
    learning_rates: Sequence[float] = LEARNING_RATES,
    *,
    horizon: int = 64,
    seeds: int = 4,
    shape: Family | None = None,
) -> list[SweepRow]:
    """Trains every learning rate under every schedule on `seeds` tasks of every training corpus, without governance.

    Args:
        learning_rates: peak learning rates.
        horizon: optimizer steps; 6 % of them warm up.
        seeds: tasks per corpus, the same ones for every learning rate.
        shape: family of the proxies.

    Returns:
        One row per schedule and learning rate, in that order.
    """
    rows = []
    for schedule in range(len(SCHEDULES)):
        losses, displacement = _train(schedule, learning_rates, horizon, seeds, shape or FleetShape())
        for i, lr in enumerate(learning_rates):
            rows.append(SweepRow(SCHEDULES[schedule], lr, float(losses[i]), tuple(displacement[:, i].tolist())))
    return rows


def _train(
    schedule: int, learning_rates: Sequence[float], horizon: int, seeds: int, shape: Family
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean losses, shape (rates,), and displacements, shape (moments, rates)."""
    rates, each = len(learning_rates), seeds * len(TRAINING_CORPORA)
    n = rates * each
    tasks = replace(
        sample_tasks(np.random.default_rng(0), n, model=shape.name),
        seed=np.tile(np.arange(each), rates),
        lr=np.repeat(np.asarray(learning_rates, dtype=np.float64), each),
        schedule=np.full(n, schedule),
        warmup=np.full(n, round(0.06 * horizon)),
        beta1=np.full(n, 0.9),
        beta2=np.full(n, 0.99),
        weight_decay=np.full(n, 0.01),
        clip=np.full(n, np.inf),
        horizon=np.full(n, horizon),
        corpus=np.tile(np.resize([CORPORA.index(name) for name in TRAINING_CORPORA], each), rates),
    )
    data = ProxyData(n, horizon, shape, BatchShape(held_out=32))
    data.put(range(n), tasks)
    runs = ProxyRuns(data)
    runs.start(range(n))
    probe, neutral = FleetProbe(runs.fleet), np.ones(n)
    initial = runs.held_out_losses()
    moments = [round(m * horizon) for m in MOMENTS]
    displacement = []
    for step in range(horizon):
        probe.before_step()
        runs.update(neutral, neutral)
        probe.after_step()
        runs.backward()
        if step in moments:
            ratio = probe.measure(runs.losses, tasks.beta2)["update_ratio"]
            displacement.append(np.nanmean((ratio * np.sqrt(horizon)).reshape(rates, each), axis=1))
    final = runs.held_out_losses()
    losses = np.where(np.isfinite(final), np.minimum(final, initial), initial)
    return losses.reshape(rates, each).mean(axis=1), np.array(displacement)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the sweep of the family that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="llama", help=f"one of {', '.join(FAMILIES)} (%(default)s)")
    try:
        shape = family(parser.parse_args(arguments).family)
    except ValueError as error:
        parser.error(str(error))
    for horizon in (64, 128):
        rows = sweep(horizon=horizon, shape=shape)
        means = {lr: np.mean([row.loss for row in rows if row.learning_rate == lr]) for lr in LEARNING_RATES}
        best = min(means, key=lambda lr: means[lr])
        print(f"horizon {horizon}: best over all schedules {best:g}, {means[best]:.3f} nats per token")
        for row in rows:
            shown = " ".join(f"{d:5.2f}" for d in row.displacement)
            print(f"  {row.schedule:9s} {row.learning_rate:7.0e}  loss {row.loss:.3f}  displacement {shown}")


if __name__ == "__main__":
    main()
