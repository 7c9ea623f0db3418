"""The main job in one command: learn on proxies, freeze, deploy beside every rule under learning-rate stress."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbw_rl.envs.recipe import load_recipe, override
from lbw_rl.training_runs.compare import Arm, compare
from lbw_rl.training_runs.folders import prepare_output
from lbw_rl.training_runs.freeze import UNTRAINED, Meter, train_and_freeze
from lbw_rl.training_runs.report import build_report
from lbw_rl.training_runs.results import Results

Meters = Callable[[str], AbstractContextManager[Meter]]
"""label → a progress meter for the length of a block."""


@dataclass(frozen=True)
class Budget:
    """How much a demo does.

    Attributes:
        decisions: that the policy learns from.
        seeds: paired runs per arm and multiplier.
        multipliers: of the recipe's learning rate.
        settings: recipe overrides.
        proxies: fresh proxies that the policy is judged on.
    """

    decisions: int
    seeds: int
    multipliers: tuple[float, ...] = (1 / 30, 1.0, 30.0)
    settings: tuple[str, ...] = ()
    proxies: int = 32


BUDGETS = {
    "quick": Budget(decisions=150_000, seeds=3),
    "full": Budget(decisions=400_000, seeds=5, multipliers=(1 / 30, 1 / 10, 1 / 3, 1.0, 3.0, 10.0, 30.0)),
}


def budget_named(name: str) -> Budget:
    """The budget of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in BUDGETS:
        raise ValueError(f"budget: {name!r} is unknown; accepted: {', '.join(BUDGETS)}")
    return BUDGETS[name]


def demo_arms(policy: Path) -> list[Arm]:
    """Who meets in the table: plain and clipped AdamW, every rule, the trained policy and its two controls."""
    return [
        Arm("AdamW", "constant"),
        Arm("AdamW + clip 1.0", "constant", ("optimizer.grad_clip=1.0",)),
        Arm("PID", "pid"),
        Arm("EntroPIC", "entropic"),
        Arm("LBW-Guard-style", "lbw-guard"),
        Arm("PPO policy", str(policy)),
        Arm("untrained policy", str(policy / UNTRAINED)),
        Arm("random actions", "random"),
    ]


def demo(
    out: str | Path, budget: Budget, meters: Meters, *, resume: bool = False, command: str | None = None
) -> tuple[Results, Path]:
    """Trains a policy on proxies and deploys it, and every rule, into Qwen2-architecture runs on real text.

    Args:
        out: output folder: `policy/`, `runs/`, `results.json`, `report.html`.
        budget: how much to do.
        meters: shows progress.
        resume: keep what an earlier attempt finished.
        command: the command line, for the record.

    Returns:
        The results and the path of the report.

    Raises:
        ValueError: an output folder in use.
    """
    folder = prepare_output(out, resume)
    policy = folder / "policy"
    with meters("1/2 learning on proxies") as meter:
        train_and_freeze(policy, decisions=budget.decisions, resume=True, meter=meter, proxies=budget.proxies)
    recipe = override(load_recipe("mini-qwen2"), list(budget.settings))
    with meters("2/2 governing mini-qwen2") as meter:

        def show(done: int, total: int, row: Any) -> None:
            meter.update(done, total, f"{row.arm} at {row.lr_multiplier:.3g}× LR: loss {row.final_loss:.3f}")

        results = compare(
            recipe,
            demo_arms(policy),
            budget.multipliers,
            budget.seeds,
            folder,
            resume=True,
            progress=show,
            command=command,
        )
    return results, build_report(folder)
