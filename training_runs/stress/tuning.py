"""Tuning the baseline: AdamW over schedule and rate, until the best rate lies inside of what was tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lbw_rl.training_runs.results import Row
from lbw_rl.training_runs.stress.plan import Plan, Setting
from lbw_rl.training_runs.stress.suite import Family, Search
from lbw_rl.training_runs.summary import capped


@dataclass(frozen=True)
class Point:
    """One setting of the search: a schedule, and a power of two, whole or half, around the recipe's rate."""

    schedule: str
    power: float


Losses = Mapping[tuple[Point, int], float]
"""(point, seed index) → final held-out loss, nats per token."""


def wanted(search: Search, losses: Losses) -> list[tuple[Point, int]]:
    """The runs that the search needs next, as (point, seed index); empty when it is over.

    First every schedule at `search.rates`; then, for each schedule whose best rate is the lowest or highest
    tried, the next rate beyond, as far as `search.reach`; then the rates half a power beside the best one of each of the best
    `search.finer` schedules; then the best `search.finalists` settings on the other seeds. What it asks for depends on `losses` alone, so a search that was cut short goes on as it would have.
    """
    start = [(Point(s, power), 0) for s in search.schedules for power in search.rates]
    if missing := [run for run in start if run not in losses]:
        return missing
    if beyond := [(p, 0) for s in search.schedules if (p := _beyond(search, s, losses)) is not None]:
        return beyond
    if between := [(p, 0) for p in _between(search, losses) if (p, 0) not in losses]:
        return between
    best = sorted(_tried(losses), key=lambda point: _rank(losses[point, 0], point))[: search.finalists]
    return [(point, i) for i in range(1, search.seeds) for point in best if (point, i) not in losses]


def chosen(search: Search, losses: Losses) -> Point:
    """The best finalist by its mean over the seeds; of equal ones the nearest to the recipe's rate."""
    means = {
        point: fmean(losses[point, i] for i in range(search.seeds))
        for point in _tried(losses)
        if all((point, i) in losses for i in range(search.seeds))
    }
    return min(means, key=lambda point: _rank(means[point], point))


def on_edge(search: Search, losses: Losses, point: Point) -> bool:
    """Whether the search ended at its reach: a better rate may lie beyond."""
    powers = [p.power for p in _tried(losses) if p.schedule == point.schedule]
    return abs(point.power) >= search.reach and point.power in (min(powers), max(powers))


def _tried(losses: Losses) -> list[Point]:
    return [point for point, seed in losses if seed == 0]


def _between(search: Search, losses: Losses) -> list[Point]:
    """Beside the best whole power of each of the best schedules: a factor of two is wider than AdamW's optimum."""
    whole = sorted(
        (p for p in _tried(losses) if p.power == round(p.power)), key=lambda point: _rank(losses[point, 0], point)
    )
    best = {point.schedule: point for point in reversed(whole)}
    leading = sorted(best.values(), key=whole.index)[: search.finer]
    points = [Point(point.schedule, point.power + half) for point in leading for half in (-0.5, 0.5)]
    return [point for point in points if abs(point.power) <= search.reach]


def _rank(loss: float, point: Point) -> tuple[float, float]:
    return loss, abs(point.power)


def _beyond(search: Search, schedule: str, losses: Losses) -> Point | None:
    powers = sorted(p.power for p in _tried(losses) if p.schedule == schedule and p.power == round(p.power))
    best = min(powers, key=lambda power: _rank(losses[Point(schedule, power), 0], Point(schedule, power)))
    step = {powers[0]: -1, powers[-1]: 1}.get(best, 0)
    return Point(schedule, best + step) if step and abs(best + step) <= search.reach else None


@dataclass
class Tuning:
    """The search on one family: what it has run, and what it found.

    Args:
        plan: whose recipes and cells.
        family: whose baseline.
    """

    plan: Plan
    family: Family

    def __post_init__(self) -> None:
        assert self.plan.budget.search is not None
        self.search = self.plan.budget.search
        self.centre = self.plan.recipes[self.family.name].optimizer.lr
        self.rows: dict[tuple[Point, int], Row] = {}

    def setting(self, point: Point) -> Setting:
        """Rate and schedule of a point."""
        return Setting(self.centre * 2.0**point.power, point.schedule)

    def wanted(self) -> list[tuple[Point, int]]:
        """As the function of that name, on what has been run."""
        return wanted(self.search, self._losses())

    def result(self) -> dict[str, Any]:
        """What the search found and what it spent, as JSON data: rate, schedule, loss, and every run.

        `at_reach` says that the best rate is the last that the search may try.
        """
        losses = self._losses()
        point = chosen(self.search, losses)
        setting = self.setting(point)
        runs = [
            {
                "schedule": p.schedule,
                "lr": self.setting(p).lr,
                "seed": row.seed,
                "final_loss": row.final_loss,
                "diverged": row.diverged,
                "seconds": row.seconds,
                "folder": row.folder,
            }
            for (p, _), row in self.rows.items()
        ]
        return {
            "lr": setting.lr,
            "schedule": setting.schedule,
            "final_loss": fmean(losses[point, i] for i in range(self.search.seeds)),
            "seeds": self.search.seeds,
            "recipe_lr": self.centre,
            "at_reach": on_edge(self.search, losses, point),
            "runs_spent": len(runs),
            "runs": runs,
        }

    def _losses(self) -> dict[tuple[Point, int], float]:
        return {run: capped(row) for run, row in self.rows.items()}
