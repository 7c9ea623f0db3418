"""Schedules that answer to the loss: their packages' rules, warmup, resume, and a governor that does not compound."""

import io
import math

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lbw_rl import Action, Authority, Controller, Governor
from lbw_rl.envs.optim import build_optimizer, build_scheduler
from lbw_rl.envs.reactive import ReactiveSchedule
from lbw_rl.envs.recipe import OptimizerSpec, Recipe, ScheduleSpec, load_recipe, override
from lbw_rl.envs.task import TrainingTask

transformers = pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")

NAMES = ("greedy", "plateau")


def schedule(name: str, warmup: int = 0, lr: float = 0.1, total: int = 300, weights: int = 1) -> ReactiveSchedule:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))]} for _ in range(weights)]
    return build_scheduler(ScheduleSpec(name=name, warmup_steps=warmup), torch.optim.SGD(groups, lr=lr), total)


def path(scheduler: ReactiveSchedule, losses: list[float]) -> list[float]:
    """The rate of each step, and of the one after the last."""
    rates = [scheduler.get_last_lr()[0]]
    for loss in losses:
        scheduler.optimizer.step()
        scheduler.step(torch.tensor(loss, dtype=torch.float64))
        rates.append(scheduler.get_last_lr()[0])
    return rates


def noisy(n: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    return [5.0 - 2.0 * min(1.0, i / 60) + 0.3 * torch.randn((), generator=generator).item() for i in range(n)]


@pytest.mark.parametrize("name", NAMES)
def test_warmup_is_that_of_the_closed_form_schedules(name):
    reactive = schedule(name, warmup=5)
    plain = build_scheduler(
        ScheduleSpec(name="constant", warmup_steps=5),
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1),
        300,
    )
    for _ in range(8):
        assert reactive.get_last_lr() == plain.get_last_lr()
        reactive.step(1.0)
        plain.optimizer.step()
        plain.step()


def test_greedy_is_the_package_s_with_the_stated_settings():
    losses = noisy(300)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    package = transformers.GreedyLR(optimizer, smooth=True, min_lr=1e-4)
    expected = [0.1]
    for loss in losses:
        package.step(loss)
        expected.append(optimizer.param_groups[0]["lr"])
    rates = path(schedule("greedy"), losses)
    assert rates == expected
    assert max(rates) > 0.1 > min(rates)  # it went both ways


def test_greedy_can_cut_a_rate_under_the_package_s_smallest():
    rates = path(schedule("greedy", lr=1e-5), [1.0] * 120)
    assert rates[-1] == pytest.approx(1e-5 * 0.95 ** ((120 - 1) // 11), rel=1e-6)


def test_plateau_is_torch_s_on_the_smoothed_loss():
    losses = noisy(300)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    package = ReduceLROnPlateau(optimizer, factor=0.5, patience=15)
    mean, expected = losses[0], [0.1]
    for loss in losses:
        mean += 0.1 * (loss - mean)
        package.step(mean)
        expected.append(optimizer.param_groups[0]["lr"])
    assert path(schedule("plateau"), losses) == expected
    assert expected[-1] < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_that_is_not_finite_is_passed_over(name):
    losses = noisy(120)
    poisoned = [*losses[:40], math.nan, math.inf, *losses[40:]]
    rates, expected = path(schedule(name), poisoned), path(schedule(name), losses)
    assert rates[40:43] == [expected[40]] * 3
    assert rates[43:] == expected[41:]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut", [0, 3, 8, 90])
def test_state_round_trip_in_warmup_and_after(name, cut):
    losses = noisy(150)
    whole = path(schedule(name, warmup=8, weights=2), losses)
    first = schedule(name, warmup=8, weights=2)
    assert path(first, losses[:cut]) == whole[: cut + 1]
    file = io.BytesIO()
    torch.save({"schedule": first.state_dict(), "optimizer": first.optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = schedule(name, warmup=8, weights=2)
    second.optimizer.load_state_dict(saved["optimizer"])
    second.load_state_dict(saved["schedule"])
    assert path(second, losses[cut:]) == whole[cut:]


class Halving(Controller):
    """Proposes one scale and remembers the scheduled rate that it saw."""

    name = "halving"
    time_limit = None

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.seen: list[float] = []

    def reset(self, context):
        pass

    def act(self, telemetry):
        self.seen.append(telemetry.learning_rate)
        return Action(lr_scale=self.scale)


@pytest.mark.parametrize("name", NAMES)
def test_a_governor_s_scale_leaves_the_base_path_alone(name, tiny):
    """The scheduled rates under a scale of 1/2 are those that the same losses give without anybody: nothing compounds."""
    settings = [f"schedule.name={name}", "schedule.warmup_steps=3", "train.steps=60", "optimizer.lr=0.3"]
    recipe: Recipe = override(load_recipe("mini-qwen2"), [*tiny, *settings])
    task, controller = TrainingTask(recipe), Halving(0.5)
    executed: list[float] = []
    losses: list[float] = []
    with Governor(
        task.optimizer, controller, authority=Authority(lr_scale=(0.1, 1.0)), measure_device=False
    ) as governor:
        task.optimizer.register_step_pre_hook(lambda o, *_: executed.append(o.param_groups[0]["lr"]))
        while task.step < task.total_steps:
            loss, _ = task.backward()
            governor.observe(loss)
            task.advance()
            losses.append(loss.item())
        assert governor.summary()["faults"] == {}
    optimizer = build_optimizer(OptimizerSpec(), torch.nn.Linear(2, 2), 0.3)
    alone = path(build_scheduler(recipe.schedule, optimizer, 60), losses)
    assert controller.seen == pytest.approx(alone[:-1], rel=1e-6)  # a signal is a float32
    assert executed == [0.5 * rate for rate in alone[:-1]]
    assert any(rate != 0.3 for rate in alone[4:])  # it moved after the warmup, too


def test_missing_transformers_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"schedule.name 'greedy' needs transformers: pip install 'lbw-rl\[hf\]'"
    ):
        schedule("greedy")
