"""Every run that a command would start, with its settings."""

from __future__ import annotations

from typing import Any

from lbw_rl.training_runs.grid import Cell
from lbw_rl.training_runs.same_run import flat_recipe
from lbw_rl.training_runs.stress.plan import Plan
from lbw_rl.training_runs.stress.tuning import Tuning


def listing(plan: Plan) -> dict[str, Any]:
    """The runs of a plan, as JSON data; nothing is loaded or written.

    Where the baseline is searched for, its first round is listed (`rounds_may_follow` is true), and the grid as if the
    search had found the recipe's own rate and schedule.

    Returns:
        `suite`, `families`, `runs` (a dict each: `stage`, `family`, `arm`, `seed`, `lr`, and `settings`, what differs
        from the family's recipe), `counts` by stage, and `rounds_may_follow`.
    """
    runs: dict[str, list[dict[str, Any]]] = {"tuning": [], "grid": [], "replay": []}
    for family in plan.families:
        base = flat_recipe(plan.recipes[family.name])
        if plan.budget.search is not None:
            search = Tuning(plan, family)
            for point, index in search.wanted():
                cell = plan.tuning_cell(family, search.setting(point), plan.seeds(family, index + 1)[-1])
                runs["tuning"].append(_described(cell, base))
        runs["grid"] += [_described(cell, base) for cell in plan.grid(family, None)]
        blind = {c.replays: [1.0] for c in plan.suite.of(family, plan.budget) if c.replays}
        if blind:
            runs["replay"] += [_described(cell, base) for cell in plan.grid(family, None, blind)]
    return {
        "suite": plan.suite.name,
        "families": [family.name for family in plan.families],
        "counts": {stage: len(of) for stage, of in runs.items()},
        "rounds_may_follow": plan.budget.search is not None,
        "runs": [{"stage": stage, **run} for stage, of in runs.items() for run in of],
    }


def _described(cell: Cell, base: dict[str, Any]) -> dict[str, Any]:
    mine = flat_recipe(cell.recipe)
    hidden = {"train.seed", "train.lr_multiplier", "controller.options.scales"}
    changed = {key: value for key, value in mine.items() if key not in hidden and base.get(key) != value}
    return {
        "family": cell.recipe.name,
        "arm": cell.arm.label,
        "seed": cell.recipe.train.seed,
        "lr": cell.recipe.optimizer.lr * cell.recipe.train.lr_multiplier,
        "schedule": cell.recipe.schedule.name,
        "steps": cell.recipe.train.steps,
        "settings": changed,
    }
