"""The stress suite's search for a baseline, and how its runs follow from its settings."""

import json
import math

import pytest

from lbw_rl.envs.recipe import known_recipes
from lbw_rl.training_runs.stress.plan import Plan, Setting
from lbw_rl.training_runs.stress.suite import (
    ALL,
    GUARD,
    MINI,
    MULTIPLIERS,
    SUITES,
    TUNED,
    Search,
    budget_named,
    suite_named,
)
from lbw_rl.training_runs.stress.tuning import Point, chosen, on_edge, wanted

# ---- the search


def searched(search, loss, start=()):
    """All runs of a search on a made-up loss, and the rounds that it took."""
    losses, rounds = dict(start), []
    while new := wanted(search, losses):
        assert not set(new) & set(losses)  # nothing twice
        rounds.append(new)
        losses |= {(point, seed): loss(point.schedule, point.power, seed) for point, seed in new}
    return losses, rounds


def bowl(**best):
    """Quadratic in the power of two, with its minimum where the schedule has it."""
    return lambda schedule, power, seed: 4.0 + 0.01 * (power - best[schedule]) ** 2 + (schedule == "cosine")


def test_a_best_rate_inside_the_first_grid_ends_the_search():
    search = Search(("linear", "cosine"))
    losses, rounds = searched(search, bowl(linear=1, cosine=-1))
    assert [len(r) for r in rounds] == [10, 4]  # the grid, then half a power beside the best of both schedules
    assert chosen(search, losses) == Point("linear", 1)
    assert not on_edge(search, losses, Point("linear", 1))


def test_each_schedule_goes_on_until_its_own_best_lies_inside():
    search = Search(("linear", "cosine"))
    losses, rounds = searched(search, bowl(linear=4, cosine=-3))
    tried = {s: sorted(p.power for p, _ in losses if p.schedule == s) for s in ("linear", "cosine")}
    assert tried == {"linear": [*range(-2, 4), 3.5, 4, 4.5, 5], "cosine": [-4, -3.5, -3, -2.5, *range(-2, 3)]}
    assert len(rounds) == 5  # the grid, then one rate of each schedule at a time, then what lies between
    assert chosen(search, losses) == Point("linear", 4)


def test_a_minimum_narrower_than_a_factor_of_two_is_found_on_the_best_schedules():
    """AdamW's best constant rate on mini-qwen2 lies between two whole powers and is worth 0.1 nats."""

    def loss(schedule, power, seed):
        return min(1.0, abs(power - 0.5)) + {"constant": 0.0, "wsd": 0.1, "linear": 0.2}[schedule]

    losses, _ = searched(Search(("linear", "wsd", "constant")), loss)
    assert chosen(Search(), losses) == Point("constant", 0.5)
    assert {p.schedule for p, _ in losses if p.power % 1} == {"constant", "wsd"}
    assert not [p for p, _ in searched(Search(("linear",), finer=0), loss)[0] if p.power % 1]


def test_the_search_is_bounded_and_says_so():
    search = Search(("linear",), reach=3)
    losses, _ = searched(search, lambda schedule, power, seed: 4.0 - power)
    assert sorted(p.power for p, _ in losses) == [-2, -1, 0, 1, 2, 2.5, 3]
    assert on_edge(search, losses, chosen(search, losses))


def test_finalists_run_on_every_seed_and_the_best_mean_wins():
    def loss(schedule, power, seed):
        lucky = power == 0 and seed == 0  # the first seed flatters the recipe's rate
        return 4.0 + 0.05 * abs(power - 1) - 0.1 * lucky

    search = Search(("linear",), finalists=2, seeds=3)
    losses, rounds = searched(search, loss)
    assert {(p.power, seed) for p, seed in rounds[-1]} == {(0, 1), (0, 2), (1, 1), (1, 2)}
    assert chosen(search, losses) == Point("linear", 1)
    assert chosen(Search(("linear",)), losses) == Point("linear", 0)


def test_of_equal_losses_the_rate_nearest_to_the_recipes_is_taken():
    search = Search(("linear",))
    losses, _ = searched(search, lambda *_: 7.0)  # all diverged
    assert chosen(search, losses) == Point("linear", 0)


def test_a_search_that_was_cut_short_asks_for_what_is_left():
    search, loss = Search(("linear", "cosine"), seeds=2), bowl(linear=4, cosine=-3)
    whole, _ = searched(search, loss)
    for cut in range(0, len(whole), 3):
        part = dict(list(whole.items())[:cut])
        assert searched(search, loss, part)[0] == whole


# ---- runs


@pytest.fixture
def plan(tiny):
    return Plan.make(
        MINI, MINI.budgets["quick"], ["mini-qwen2-150", "mini-qwen2-batch32"], [*tiny, "optimizer.weight_decay=0.02"]
    )


def by_arm(cells, multiplier=1.0):
    return {c.arm.label: c for c in cells if c.recipe.train.lr_multiplier == multiplier}


def test_a_family_is_its_recipe_with_its_own_overrides_and_the_commands_last(plan, tiny):
    recipes = plan.recipes
    assert {name: r.name for name, r in recipes.items()} == {name: name for name in recipes}
    assert recipes["mini-qwen2-150"].train.steps == 6  # what the command says, over the family's 150
    without = [s for s in tiny if not s.startswith("train.batch_size")]
    free = Plan.make(MINI, MINI.budgets["quick"], ["mini-qwen2-batch32"], without)
    assert free.recipes["mini-qwen2-batch32"].train.batch_size == 32
    assert {r.train.checkpoint_every for r in recipes.values()} == {0}


def test_the_tuned_setting_is_multiplier_one_of_every_arm(plan):
    family = plan.families[0]
    cells = list(plan.grid(family, Setting(0.02, "wsd")))
    assert len(cells) == 3 * 4
    assert {c.recipe.optimizer.lr for c in cells} == {0.02}
    at_base = by_arm(cells)
    assert at_base[TUNED].recipe.schedule.name == "wsd"
    assert at_base["Schedule-Free"].recipe.schedule.name == "constant"
    assert at_base[GUARD].recipe.controller.name == "lbw-guard"
    assert {c.mode for c in cells if c.arm.label != GUARD} == {"off"}
    assert at_base[GUARD].mode == "govern"
    assert sorted({c.recipe.train.lr_multiplier for c in cells}) == sorted(plan.budget.multipliers)


def test_the_search_and_the_grid_share_a_run(plan):
    family = plan.families[0]
    setting = Setting(0.02, "wsd")
    assert plan.tuning_cell(family, setting, 0).folder == by_arm(plan.grid(family, setting))[TUNED].folder


def test_a_folder_follows_from_every_setting(plan, tiny):
    family = plan.families[0]
    setting = Setting(0.02, "wsd")
    longer = Plan.make(MINI, MINI.budgets["quick"], ["mini-qwen2-150"], [*tiny, "train.steps=7"])
    cells = [
        *plan.grid(family, setting, seeds=2),
        *plan.grid(family, Setting(0.021, "wsd")),
        *plan.grid(family, Setting(0.02, "linear")),
        *plan.grid(plan.families[1], setting),
        *longer.grid(longer.families[0], setting),
    ]
    recipes = {json.dumps(c.recipe.model_dump(mode="json"), sort_keys=True) for c in cells}
    assert len({c.folder for c in cells}) == len(recipes) > 60


def test_seeds_are_counted_from_the_recipes_own(tiny):
    plan = Plan.make(MINI, MINI.budgets["full"], ["mini-qwen2-150"], tiny)
    cells = list(plan.grid(plan.families[0], None))
    assert [c.recipe.train.seed for c in cells] == [s for s in range(3) for _ in range(len(cells) // 3)]
    assert list(plan.seeds(plan.families[0], 3)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((["nobody"], []), "families: 'nobody' is unknown in suite 'mini'; accepted: mini-qwen2, "),
        ((["mini-qwen2-150"], ["train.stops=4"]), "train.stops: unknown key; did you mean train.steps?"),
    ],
)
def test_what_is_refused_before_anything_runs(arguments, reason):
    with pytest.raises(ValueError) as caught:
        Plan.make(MINI, MINI.budgets["quick"], *arguments)
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
@pytest.mark.parametrize(
    "setting",
    [
        *("train.seed=4", "train.lr_multiplier=2", "name=x", "controller.name=pid", "controller.options.kp=1"),
        *("optimizer.name=sgd", " optimizer.lr = 0.1", "optimizer.grad_clip=1.0", "optimizer.adaptive_clip=zclip"),
        "schedule.name=linear",
    ],
)
def test_what_the_arms_decide_is_not_for_the_command_to_set(suite, setting):
    """It would hold for arms that are labelled otherwise, or be written over without a word."""
    with pytest.raises(ValueError) as caught:
        Plan.make(suite, suite.budgets["quick"], settings=["train.steps=6", setting])
    assert str(caught.value) == (
        f"set: {setting.strip()} is for the suite's arms to decide ({setting.partition('=')[0].strip()}); accepted: any "
        "other recipe setting, or `lbw-rl compare RECIPE` with arms and multipliers of your own"
    )


def test_no_setting_of_the_command_meets_one_of_an_arm(tiny):
    """Whatever contenders a suite has: what one of them overrides, the command may not set for the others."""
    for override in {o for c in MINI.contenders for o in c.arm.overrides}:
        with pytest.raises(ValueError, match=r"^set: .* is for the suite's arms to decide"):
            Plan.make(MINI, MINI.budgets["quick"], settings=[override])
    Plan.make(MINI, MINI.budgets["quick"], settings=[*tiny, "optimizer.weight_decay=0.1", "schedule.warmup_steps=3"])


def test_names_that_are_none():
    with pytest.raises(ValueError, match=r"^suite: 'maxi' is unknown; accepted: mini, qwen2.5, tinyllama$"):
        suite_named("maxi")
    with pytest.raises(ValueError, match=r"^budget: 'huge' is unknown; accepted: quick, full$"):
        budget_named(MINI, "huge")


def test_a_folder_keeps_its_suite_and_its_settings(plan, tiny, tmp_path):
    plan.keep(tmp_path)
    plan.keep(tmp_path)
    Plan.make(MINI, MINI.budgets["full"], ["mini-qwen2-1000"], plan.settings).keep(
        tmp_path
    )  # budget and families may change
    with pytest.raises(
        ValueError, match=r"^resume: .* was started with --set .*optimizer.weight_decay=0.02.*, not .*; accepted"
    ):
        Plan.make(MINI, MINI.budgets["quick"], ["mini-qwen2-150"], tiny).keep(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"^out: .* holds files but no suite to resume"):
        plan.keep(other)


# ---- the suites themselves


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_a_suite_names_nothing_that_it_lacks(suite):
    names = [f.name for f in suite.families]
    labels = [c.arm.label for c in suite.contenders]
    assert len(set(names)) == len(names)
    assert len(set(labels)) == len(labels)
    for family in suite.families:
        assert set(family.contenders) <= set(labels)
        assert GUARD in family.contenders
    for budget in suite.budgets.values():
        assert set(budget.families) <= set(names)
        assert 1.0 in budget.multipliers
    assert set(suite.anchors) | {family for _, family in suite.sizes} <= set(names)
    assert {c.replays for c in suite.contenders} <= {None, *labels}


def test_the_mini_suite_is_the_one_that_the_targets_speak_of():
    assert [round(m * 30, 9) for m in MULTIPLIERS] == [1, 3, 10, 30, 90, 300, 900, 3000]
    full = MINI.budgets["full"]
    assert (full.multipliers, full.seeds, full.families) == (MULTIPLIERS, 3, tuple(f.name for f in MINI.families))
    assert full.search is not None
    assert set(full.search.schedules) == {"constant", "linear", "cosine", "wsd"}
    assert {f.name for f in MINI.families if f.chosen_on} == {"mini-qwen2", "mini-qwen2-1000"}
    assert {"Prodigy", "ZClip", "AdaGC", "GreedyLR", "ReduceLROnPlateau", "random actions", "open-loop replay"} <= set(
        ALL
    )


SHIPPED = [(s, f) for s in SUITES.values() for f in s.families if f.recipe in known_recipes()]


@pytest.mark.parametrize(("suite", "family"), SHIPPED, ids=[f.name for _, f in SHIPPED])
def test_every_run_of_every_family_is_a_valid_recipe(suite, family):
    for budget in suite.budgets.values():
        plan = Plan.make(suite, budget, [family.name])
        cells = list(plan.grid(family, Setting(1e-3, "linear") if budget.search else None))
        assert len({(c.arm.label, c.recipe.train.lr_multiplier, c.recipe.train.seed) for c in cells}) == len(cells)
        rates = {c.recipe.optimizer.lr * c.recipe.train.lr_multiplier for c in cells if c.arm.label == GUARD}
        assert len(rates) == len(budget.multipliers)
    if suite is not MINI:  # the source's own rates
        source = Plan.make(suite, suite.budgets["quick"], [family.name])
        rates = {c.recipe.optimizer.lr * c.recipe.train.lr_multiplier for c in source.grid(family, None)}
        base = source.recipes[family.name].optimizer.lr
        assert sorted(rates) == pytest.approx([base, base * 10 / 3, base * 10])
        assert math.isclose(base, 3e-4) or suite.name != "qwen2.5"
