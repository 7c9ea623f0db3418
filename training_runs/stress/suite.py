"""What the stress suites hold, as data: families of runs, contenders, budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lbw_rl.training_runs.grid import Arm


@dataclass(frozen=True)
class Family:
    """Runs that differ in contender, rate and seed alone.

    Attributes:
        name: what results call it; also its folder.
        recipe: the shipped recipe that it starts from.
        contenders: labels of those that run on it.
        overrides: what it changes in the recipe.
        chosen_on: whether the constants of `lbw-guard` were chosen on it; every other family is held out.
    """

    name: str
    recipe: str
    contenders: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    chosen_on: bool = False


@dataclass(frozen=True)
class Contender:
    """An arm, and what of the tuned baseline it starts from.

    Attributes:
        arm: controller and overrides.
        base: what multiplier 1 is: "tuned" has the rate and the schedule that the search found for AdamW,
            "tuned rate" has the rate alone, "recipe" has neither.
        multipliers: where it runs; None is all multipliers of the budget.
        replays: label of the contender whose mean scale at multiplier 1 it repeats, blind to its own telemetry.
        thorough: whether it runs in a thorough budget only.
    """

    arm: Arm
    base: Literal["tuned", "tuned rate", "recipe"] = "tuned"
    multipliers: tuple[float, ...] | None = None
    replays: str | None = None
    thorough: bool = False


@dataclass(frozen=True)
class Search:
    """How the baseline is tuned: every schedule × rate, then more rates where the best lies on an edge.

    Attributes:
        schedules: values of `schedule.name`.
        rates: powers of two around the recipe's rate that every schedule starts with, in order.
        reach: largest power that an extension goes to.
        finer: schedules, the best ones, that are also tried at the rates half a power of two beside their best.
        finalists: settings that run on all seeds; the search itself is on the first.
        seeds: for the finalists.
    """

    schedules: tuple[str, ...] = ("constant", "linear", "cosine", "wsd")
    rates: tuple[int, ...] = (-2, -1, 0, 1, 2)
    reach: int = 7
    finer: int = 2
    finalists: int = 3
    seeds: int = 1


@dataclass(frozen=True)
class Budget:
    """How much of a suite is run.

    Attributes:
        families: names, in order.
        multipliers: of the rate that is multiplier 1.
        seeds: paired runs per contender and multiplier.
        search: how the baseline is tuned; None: it is not, and stands at its best multiplier.
        thorough: whether the contenders run that are marked so.
    """

    families: tuple[str, ...]
    multipliers: tuple[float, ...]
    seeds: int
    search: Search | None
    thorough: bool


@dataclass(frozen=True)
class Suite:
    """A suite.

    Attributes:
        name: on the command line.
        families: all of them.
        contenders: all of them.
        budgets: by name.
        settings: recipe settings of every run.
        anchors: families that stand for the source's reference model, the first that was run.
        sizes: families that stand for its rows on model size: (row, family).
        full_parameter: the family that stands for its row without LoRA.
        workers: local processes unless the command says otherwise; None: one per core.
    """

    name: str
    families: tuple[Family, ...]
    contenders: tuple[Contender, ...]
    budgets: Mapping[str, Budget]
    settings: tuple[str, ...]
    anchors: tuple[str, ...]
    sizes: tuple[tuple[str, str], ...]
    full_parameter: str
    workers: int | None = None

    def family(self, name: str) -> Family:
        """The family of that name.

        Raises:
            ValueError: there is none.
        """
        for family in self.families:
            if family.name == name:
                return family
        known = ", ".join(f.name for f in self.families)
        raise ValueError(f"families: {name!r} is unknown in suite {self.name!r}; accepted: {known}")

    def contender(self, label: str) -> Contender:
        """The contender of that label.

        Raises:
            KeyError: there is none.
        """
        return {c.arm.label: c for c in self.contenders}[label]

    def of(self, family: Family, budget: Budget) -> list[Contender]:
        """The contenders that run on a family within a budget."""
        mine = [self.contender(label) for label in family.contenders]
        tuned = budget.search is not None
        return [c for c in mine if (budget.thorough or not c.thorough) and (tuned or c.base == "recipe")]


MULTIPLIERS = (1 / 30, 1 / 10, 1 / 3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""The whole axis: four decades less half a one, about evenly spaced in the logarithm."""

TUNED = "AdamW, tuned"
"""The baseline of every ratio: AdamW at the best rate and schedule that a search of its own found."""

ADAMW = "AdamW"
GUARD = "LBW-Guard-style"
REPLAY = "open-loop replay"


def _plain(label: str, *overrides: str) -> Contender:
    return Contender(Arm(label, "constant", overrides))


_MINI_CONTENDERS = (
    _plain(TUNED),
    Contender(Arm("AdamW, recipe's schedule", "constant"), base="tuned rate"),
    # The governor shortens momentum: an AdamW with that momentum tells how much of its gain is that alone.
    _plain("AdamW, β1 0.8", "optimizer.betas=[0.8, 0.999]"),
    _plain("AdamW + clip 1.0", "optimizer.grad_clip=1.0"),
    Contender(Arm("AdamW + clip 0.5", "constant", ("optimizer.grad_clip=0.5",)), thorough=True),
    _plain("ZClip", "optimizer.adaptive_clip=zclip"),
    _plain("AdaGC", "optimizer.adaptive_clip=adagc"),
    _plain("StableAdamW", "optimizer.name=stable-adamw"),
    # Its average takes a schedule's place; Prodigy's rate is a factor on the one that it finds, made for 1.
    _plain("Schedule-Free", "optimizer.name=schedule-free", "schedule.name=constant"),
    _plain("Prodigy", "optimizer.name=prodigy", "optimizer.lr=1.0"),
    _plain("GreedyLR", "schedule.name=greedy"),
    _plain("ReduceLROnPlateau", "schedule.name=plateau"),
    Contender(Arm("random actions", "random")),
    Contender(Arm("PID", "pid")),
    Contender(Arm("EntroPIC", "entropic")),
    Contender(Arm(GUARD, "lbw-guard")),
    Contender(Arm(REPLAY, "open-loop"), replays=GUARD),
    *(
        Contender(Arm(f"{GUARD} on {name}", "lbw-guard", (f"schedule.name={name}",)), multipliers=(1.0,), thorough=True)
        for name in ("constant", "linear", "cosine", "wsd")
    ),
)

ALL = tuple(c.arm.label for c in _MINI_CONTENDERS)
SHORT = (TUNED, "Schedule-Free", GUARD)
MIRROR = (TUNED, "AdamW + clip 1.0", "AdamW + clip 0.5", "Schedule-Free", GUARD)
"""Of families that stand for the source's own runs: its clipping baselines as well."""

_MINI_FAMILIES = (
    Family("mini-qwen2", "mini-qwen2", ALL, chosen_on=True),
    Family("mini-llama", "mini-llama", MIRROR),
    Family("mini-qwen2-lora", "mini-qwen2-lora", MIRROR),
    Family("mini-llama-full", "mini-llama-full", MIRROR),
    Family("mini-qwen2-50k", "mini-qwen2-50k", SHORT),
    Family("mini-qwen2-1m", "mini-qwen2-1m", SHORT),
    Family("mini-qwen2-4m", "mini-qwen2-4m", SHORT, ("train.steps=150",)),
    Family("mini-qwen2-batch32", "mini-qwen2", SHORT, ("train.batch_size=32",)),
    Family("mini-qwen2-150", "mini-qwen2", SHORT, ("train.steps=150",)),
    Family("mini-qwen2-1000", "mini-qwen2", SHORT, ("train.steps=1000",), chosen_on=True),
    Family("mini-qwen2-2000", "mini-qwen2", SHORT, ("train.steps=2000",)),
    Family("mini-llama-1000", "mini-llama", SHORT, ("train.steps=1000",)),
)

MINI = Suite(
    name="mini",
    families=_MINI_FAMILIES,
    contenders=_MINI_CONTENDERS,
    budgets={
        "quick": Budget(
            families=("mini-qwen2", "mini-llama", "mini-qwen2-lora"),
            multipliers=(1 / 30, 1.0, 10.0, 30.0),
            seeds=1,
            search=Search(),
            thorough=False,
        ),
        "full": Budget(
            families=tuple(family.name for family in _MINI_FAMILIES),
            multipliers=MULTIPLIERS,
            seeds=3,
            search=Search(seeds=3),
            thorough=True,
        ),
    },
    # Time to a loss is read off the evaluations, so they are close together; a run is over before a checkpoint pays.
    settings=("train.eval_every=10", "train.checkpoint_every=0", "train.threads=1"),
    anchors=("mini-qwen2-lora", "mini-qwen2"),
    sizes=(
        ("Model size: 3B", "mini-qwen2-50k"),
        ("Model size: 14B", "mini-qwen2-1m"),
        ("Model size: larger still", "mini-qwen2-4m"),
    ),
    full_parameter="mini-llama-full",
)

# The sources' own grid: the rates 3e-4, 1e-3 and 3e-3, as multiples of the recipes' 3e-4.
_SOURCE_RATES = (1.0, 10 / 3, 10.0)

_BIG_CONTENDERS = (
    *(
        Contender(Arm(name + clip, controller, overrides), base="recipe")
        for name, controller in ((ADAMW, "constant"), (GUARD, "lbw-guard"))
        for clip, overrides in (
            ("", ()),
            (" + clip 0.5", ("optimizer.grad_clip=0.5",)),
            (" + clip 1.0", ("optimizer.grad_clip=1.0",)),
        )
    ),
    Contender(Arm(TUNED, "constant"), multipliers=(1.0,)),
)


def _source_suite(name: str, families: tuple[str, ...], first: str, sizes: Mapping[str, str], full: str) -> Suite:
    """The source's grid on recipes of real size; the full budget also tunes AdamW, on which the source is silent."""
    everyone = tuple(c.arm.label for c in _BIG_CONTENDERS)
    search = Search(schedules=("constant", "linear", "cosine"), rates=(-1, 0, 1), reach=4, finalists=1)
    return Suite(
        name=name,
        families=tuple(Family(family, family, everyone) for family in families),
        contenders=_BIG_CONTENDERS,
        budgets={
            "quick": Budget((first,), _SOURCE_RATES, seeds=1, search=None, thorough=False),
            "full": Budget(families, _SOURCE_RATES, seeds=3, search=search, thorough=True),
        },
        settings=(),
        anchors=(first,),
        sizes=tuple(sizes.items()),
        full_parameter=full,
        workers=1,  # one model fills an accelerator
    )


SUITES = {
    suite.name: suite
    for suite in (
        MINI,
        _source_suite(
            "qwen2.5",
            ("qwen2.5-7b", "qwen2.5-3b", "qwen2.5-14b"),
            "qwen2.5-7b",
            {"Model size: 3B": "qwen2.5-3b", "Model size: 14B": "qwen2.5-14b"},
            "",
        ),
        _source_suite("tinyllama", ("tinyllama-1.1b-full",), "tinyllama-1.1b-full", {}, "tinyllama-1.1b-full"),
    )
}


def suite_named(name: str) -> Suite:
    """The suite of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in SUITES:
        raise ValueError(f"suite: {name!r} is unknown; accepted: {', '.join(SUITES)}")
    return SUITES[name]


def budget_named(suite: Suite, name: str) -> Budget:
    """The suite's budget of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in suite.budgets:
        raise ValueError(f"budget: {name!r} is unknown; accepted: {', '.join(suite.budgets)}")
    return suite.budgets[name]
