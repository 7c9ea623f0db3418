"""Learning-rate schedules that answer to the training loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lbw_rl.envs.extras import hf_package
from lbw_rl.envs.specs import ScheduleSpec

_NEWEST = 0.1  # weight of the newest loss in the mean that `plateau` judges: about ten steps


class ReactiveSchedule:
    """Linear warmup as in the closed-form schedules, then a scheduler that is told every step's training loss.

    Both were made for a metric that comes once an epoch. A step's loss scatters by ten times what a step gains, so
    that each gets a mean over several steps and bounds that fit any base rate:

    - `greedy`: transformers' `GreedyLR` (2512.14527) at its defaults, rate ÷ 0.95 after more than 10 better losses in a row
      and × 0.95 after more than 10 that are not, up to 1, with its `smooth` option (mean of the last 50). Its smallest rate of
      1e-3 would forbid any cut to a run whose base rate is lower; here it is a thousandth of the base rate.
    - `plateau`: torch's `ReduceLROnPlateau` on an exponential mean over about ten losses. Rate × 0.5 after `patience` steps
      without a new best, patience a twentieth of the run and at least 10: room for several cuts in a short run, where torch's
      × 0.1 would end it at the first lull.

    A loss that is not finite is no metric and is passed over; losses of the warmup are not judged. The scheduler writes the
    scheduled rate and never sees a governor's scale, which lives inside the optimizer's step only.

    Args:
        spec: the recipe's `[schedule]` section.
        optimizer: at its peak learning rate.
        total_steps: planned optimizer steps.

    Attributes:
        base_lrs: peak learning rate of each parameter group.
        steps: optimizer steps done.

    Raises:
        ModuleNotFoundError: `greedy` without the extra `lbw-rl[hf]`.
    """

    def __init__(self, spec: ScheduleSpec, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        self.optimizer = optimizer
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.steps = 0
        self._warmup = spec.warmup_steps
        self._mean: float | None = None
        self._averages = spec.name == "plateau"
        self._scheduler: Any
        if spec.name == "greedy":
            greedy = hf_package("transformers", "schedule.name 'greedy'").GreedyLR
            self._scheduler = greedy(optimizer, smooth=True, min_lr=[1e-3 * lr for lr in self.base_lrs])
        else:
            self._scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=max(10, total_steps // 20))
        if self._warmup:
            self._warm_up()

    def step(self, loss: torch.Tensor | float) -> None:
        """Sets the rate of the next optimizer step.

        Args:
            loss: training loss of the step just taken. It is read on the host, except in warmup.
        """
        self.steps += 1
        if self.steps <= self._warmup:
            self._warm_up()
            return
        value = float(loss)
        if not math.isfinite(value):
            return
        if self._averages:
            value = self._mean = value if self._mean is None else self._mean + _NEWEST * (value - self._mean)
        self._scheduler.step(value)

    def _warm_up(self) -> None:
        share = min(1.0, (self.steps + 1) / self._warmup)
        self._write([lr * share for lr in self.base_lrs])

    def _write(self, rates: list[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate

    def get_last_lr(self) -> list[float]:
        """The rates of the next step, as torch's schedulers tell them."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Counts and means; the rates themselves are in the optimizer's state."""
        return {"steps": self.steps, "mean": self._mean, "scheduler": self._scheduler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`, after the optimizer's own state has been loaded."""
        self.steps, self._mean = int(state["steps"]), state["mean"]
        rates = self.get_last_lr()
        self._scheduler.load_state_dict(dict(state["scheduler"]))  # GreedyLR writes the rate of its last judgement
        self._write(rates)
