"""From a suite to runs: the recipe and the folder of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbw_rl.envs.recipe import Recipe, load_recipe, override
from lbw_rl.registry import load_controller
from lbw_rl.training_runs.folders import write_json
from lbw_rl.training_runs.grid import Arm, Cell, slug
from lbw_rl.training_runs.stress.suite import TUNED, Budget, Contender, Family, Suite
from lbw_rl.training_runs.summary import UNGOVERNED

PLAN = "plan.json"
_DECIDED = (
    *("name", "train.lr_multiplier", "train.seed", "schedule.name"),
    *("optimizer.name", "optimizer.lr", "optimizer.grad_clip", "optimizer.adaptive_clip"),
)
"""Settings that name families and arms, or that the search and the grid write over."""


@dataclass(frozen=True)
class Setting:
    """A rate (before `train.lr_multiplier`) and a schedule."""

    lr: float
    schedule: str


@dataclass(frozen=True)
class Plan:
    """What one command asks for.

    Attributes:
        suite: the suite.
        budget: how much of it.
        families: those that are run, in order.
        settings: `key=value` recipe settings of the command, which win over the families'.
        recipes: family → its recipe, before tuning.
    """

    suite: Suite
    budget: Budget
    families: tuple[Family, ...]
    settings: tuple[str, ...]
    recipes: Mapping[str, Recipe]

    @classmethod
    def make(cls, suite: Suite, budget: Budget, families: Sequence[str] = (), settings: Sequence[str] = ()) -> Plan:
        """Reads the recipes; `families` replaces the budget's.

        Raises:
            ValueError: an unknown family or recipe, a setting that a recipe does not take or that is for the suite's arms
                to decide, or a contender that no recipe can hold.
        """
        _refuse_what_arms_decide(suite, settings)
        chosen = tuple(suite.family(name) for name in dict.fromkeys(families or budget.families))
        recipes = {
            f.name: override(
                load_recipe(f.recipe), [f"name={json.dumps(f.name)}", *suite.settings, *f.overrides, *settings]
            )
            for f in chosen
        }
        plan = cls(suite, budget, chosen, tuple(settings), recipes)
        plan._check_contenders()
        return plan

    def _check_contenders(self) -> None:
        """A bad option must not show after an hour of runs."""
        for family in self.families:
            blind = {c.replays: [1.0] for c in self.suite.of(family, self.budget) if c.replays}
            for cell in (*self.grid(family, None, seeds=1), *self.grid(family, None, blind, seeds=1)):
                load_controller(cell.recipe.controller.name, **cell.recipe.controller.options)

    def seeds(self, family: Family, count: int) -> range:
        """The first `count` seeds, from the recipe's own."""
        first = self.recipes[family.name].train.seed
        return range(first, first + count)

    def tuning_cell(self, family: Family, setting: Setting, seed: int) -> Cell:
        """The run of one setting of the search for the baseline."""
        arm = self.suite.contender(TUNED).arm
        values = ["train.lr_multiplier=1.0", f"train.seed={seed}"]
        return _cell(arm, _at(self.recipes[family.name], setting), values)

    def grid(
        self,
        family: Family,
        tuned: Setting | None,
        scales: Mapping[str, Sequence[float]] | None = None,
        *,
        seeds: int | None = None,
    ) -> Iterator[Cell]:
        """The cells of one family: seed by seed, so that a grid cut short still holds complete pairs.

        Args:
            family: whose.
            tuned: what the search found; None stands the recipe's own in, where it is not searched for or not yet known.
            scales: contender → mean scale by decision, for those that replay it. Without it the contenders that
                replay are left out, with it all others are, and those that replay one who is not in it.
            seeds: the budget's by default.
        """
        base = self.recipes[family.name]
        for seed in self.seeds(family, seeds or self.budget.seeds):
            for multiplier in self.budget.multipliers:
                for contender in self.suite.of(family, self.budget):
                    if (contender.replays is None) != (scales is None) or not _runs_at(contender, multiplier):
                        continue
                    values = [f"train.lr_multiplier={float(multiplier)!r}", f"train.seed={seed}"]
                    if contender.replays is not None and scales is not None:
                        if contender.replays not in scales:
                            continue
                        values.append(f"controller.options.scales={list(scales[contender.replays])!r}")
                    yield _cell(contender.arm, _based(base, contender, tuned), values)

    def keep(self, folder: Path) -> None:
        """Writes down what makes the runs in `folder`, or finds that it is what made those that are there.

        Raises:
            ValueError: the folder is of another suite, or of other settings.
        """
        path, mine = folder / PLAN, {"suite": self.suite.name, "settings": sorted(self.settings)}
        if not path.exists():
            if any(entry.name != "runs" and not entry.name.endswith(".tmp") for entry in folder.iterdir()):
                raise ValueError(
                    f"out: {folder} holds files but no suite to resume; accepted: a suite's folder, or a new one"
                )
            write_json(path, mine)
            return
        try:
            before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise ValueError(f"resume: {path} is damaged ({e}); accepted: a suite's own, or a new --out") from e
        for key, option in (("suite", "--suite"), ("settings", "--set")):
            if before.get(key) != mine[key]:
                raise ValueError(
                    f"resume: {folder} was started with {option} {_shown(before.get(key))}, not {_shown(mine[key])}; "
                    "accepted: the same (budget and families may change), or a new --out"
                )


def _refuse_what_arms_decide(suite: Suite, settings: Sequence[str]) -> None:
    """Such a setting would hold for arms that are named after another one, or be written over."""
    decided = {*_DECIDED, *(_key(override) for c in suite.contenders for override in c.arm.overrides)}
    for setting in settings:
        key = _key(setting)
        if key in decided or key.startswith("controller."):
            raise ValueError(
                f"set: {setting.strip()} is for the suite's arms to decide ({key}); accepted: any other recipe setting, or "
                "`lbw-rl compare RECIPE` with arms and multipliers of your own"
            )


def _key(setting: str) -> str:
    return setting.partition("=")[0].strip()


def _runs_at(contender: Contender, multiplier: float) -> bool:
    return contender.multipliers is None or multiplier in contender.multipliers


def _shown(value: Any) -> str:
    return " ".join(value) or "(none)" if isinstance(value, list) else str(value)


def _at(recipe: Recipe, setting: Setting) -> Recipe:
    return override(recipe, [f"optimizer.lr={setting.lr!r}", f"schedule.name={setting.schedule}"])


def _based(recipe: Recipe, contender: Contender, tuned: Setting | None) -> Recipe:
    if tuned is None or contender.base == "recipe":
        return recipe
    schedule = tuned.schedule if contender.base == "tuned" else recipe.schedule.name
    return _at(recipe, Setting(tuned.lr, schedule))


def _cell(arm: Arm, recipe: Recipe, settings: Sequence[str]) -> Cell:
    """A run whose folder follows from its recipe alone, so that whatever asks for the same run finds it finished.

    An optimizer alone runs with governance off: its time is then its own.
    """
    chosen = arm.on(recipe, settings)
    described = json.dumps(chosen.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    unique = hashlib.sha256(described.encode()).hexdigest()[:8]
    o, t = chosen.optimizer, chosen.train
    what = (
        o.name + (f"-clip{o.grad_clip:g}" if o.grad_clip else "") + (f"-{o.adaptive_clip}" if o.adaptive_clip else "")
    )
    alone = chosen.controller.name in UNGOVERNED
    what += "" if alone else f"-{slug(Path(chosen.controller.name).name)}"
    rate = f"{o.lr * t.lr_multiplier:.3g}"
    folder = f"runs/{slug(chosen.name)}/{what}/{chosen.schedule.name}-lr{rate}-seed{t.seed}-{unique}"
    return Cell(arm, chosen, folder, "off" if alone else "govern")
