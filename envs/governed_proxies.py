"""A proxy fleet under control: what is measured of it, the rule that may go along, and what is executed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lbw_rl.action import Action, Directive
from lbw_rl.authority import Authority
from lbw_rl.controller import Context, Controller
from lbw_rl.envs.fleet import FloatArray
from lbw_rl.envs.fleet_signals import FleetProbe
from lbw_rl.envs.interface import command
from lbw_rl.envs.proxy_runs import ProxyData, ProxyRuns
from lbw_rl.registry import load_controller
from lbw_rl.signals import Telemetry
from lbw_rl.steering import relative, steered

Arrays = dict[str, FloatArray]


class GovernedProxies:
    """The governed side of a proxy fleet.

    Without a rule an action is a pair of positions within the authority. With one, each run has a controller of that name
    that sees the run's telemetry and decides at its own pace, by default at every step, and an action is a pair of multiples of
    all that it proposes until the next action (`lbw_rl.steering`).

    Args:
        data: tasks and data of the runs.
        authority: what every executed action is held to.
        decide_every: optimizer steps per action.
        rule: a controller, of which every run gets a copy, its name, or the folder of a frozen policy; or None.

    Raises:
        ValueError: a rule whose own pace does not divide `decide_every`.
    """

    def __init__(
        self, data: ProxyData, authority: Authority, decide_every: int, rule: str | Path | Controller | None
    ) -> None:
        self.runs = ProxyRuns(data)
        self.authority, self.decide_every = authority, decide_every
        self._probe = FleetProbe(self.runs.fleet)
        n = self.runs.fleet.n
        one = None if rule is None else load_controller(rule)
        self._rules: list[Controller] | None = None if one is None else [copy.deepcopy(one) for _ in range(n)]
        self._pace = decide_every if one is None else one.decide_every or 1  # steps between two looks at the runs
        if one is not None and decide_every % self._pace:
            raise ValueError(
                f"decide_every: {decide_every} is no multiple of the {self._pace} steps that {one.name} decides at"
            )
        self._units: NDArray[np.floating] | None = None
        self._proposals = [Action() for _ in range(n)]
        self._proposed = np.full(n, np.nan)  # learning-rate scales at the decision before
        self.executed = [Action() for _ in range(n)]

    def start(self, rows: Sequence[int]) -> None:
        """Starts the runs in `rows` from their tasks' weights, with nothing known of them."""
        self.runs.start(rows)
        self._probe.reset(rows)
        tasks = self.runs.data.tasks
        for row in rows:
            self.executed[row] = Action()
            self._proposed[row] = np.nan
            if self._rules is not None:
                self._rules[row].reset(
                    Context(
                        total_steps=int(tasks.horizon[row]),
                        decide_every=self._pace,
                        authority=self.authority,
                        seed=int(tasks.seed[row] % 2**31),
                        weights=self.runs.fleet.matrices,
                        low_rank=self.runs.data.family.name == "lora",
                        momentum=float(tasks.beta1[row]),
                    )
                )

    def telemetry(self, rows: Sequence[int]) -> Arrays:
        """The record of the step at hand of the runs in `rows`, NaN in the others; their rules take it in.

        Returns:
            signal name → shape (n,).
        """
        runs, tasks = self.runs, self.runs.data.tasks
        whole = len(rows) == runs.fleet.n
        values = self._probe.measure(runs.losses, tasks.beta2, None if whole else rows)
        values["step"] = runs.step.astype(np.float64)
        values["progress"] = runs.step / tasks.horizon
        values["learning_rate"] = runs.learning_rate()
        before = tasks.learning_rate(np.maximum(runs.step - 1, 0))
        values["previous_learning_rate"] = np.where(runs.step > 0, before, np.nan)
        values["lr_scale"] = np.array([a.lr_scale for a in self.executed])
        values["momentum_scale"] = np.array([a.momentum_scale for a in self.executed])
        if not whole:
            others = np.ones(runs.fleet.n, dtype=bool)
            others[list(rows)] = False
            values = {name: np.where(others, np.nan, v) for name, v in values.items()}
        if self._rules is not None:
            for row in rows:
                signals = {name: float(v[row]) for name, v in values.items()}
                record = Telemetry(**signals, group_grad_entropy=())
                self._proposed[row] = self._proposals[row].lr_scale if runs.step[row] else np.nan
                self._proposals[row] = self._rules[row].act(record)
        return values

    def observed(self, telemetry: Arrays) -> Arrays:
        """`telemetry` as the features read it: with a rule, the last scale in units of what that had proposed."""
        return telemetry if self._rules is None else relative(telemetry, self._proposed)

    def command(self, units: NDArray[np.floating] | None) -> None:
        """Takes the actions that hold until the next ones.

        Args:
            units: actions, shape (n, 2); None leaves the runs alone, or to their rules.

        Raises:
            ValueError: an action that is NaN.
        """
        if units is not None and np.isnan(units).any():
            raise ValueError(f"action {units} holds NaN; accepted: finite numbers, clipped to [-1, 1]")
        self._units = units
        self._execute()

    def _execute(self) -> None:
        """What is executed at the step at hand, and until the rules decide again."""
        units = self._units
        if units is None:
            wanted = self._proposals
        elif self._rules is None:
            wanted = [command(unit, self.authority) for unit in units]
        else:
            wanted = [steered(p, unit) for p, unit in zip(self._proposals, units, strict=True)]
        self.executed = [
            self.authority.clip(action, last.lr_scale)[0] for action, last in zip(wanted, self.executed, strict=True)
        ]

    def advance(self) -> None:
        """The optimizer steps of one action, all runs at once, and the gradient of the step after them.

        A skip concerns the step that was decided on, and the update of the last step is what the next telemetry tells of.
        """
        for first in range(0, self.decide_every, self._pace):
            if first:
                self.telemetry(range(self.runs.fleet.n))
                self._execute()
            lr_scale = np.array([a.lr_scale for a in self.executed])
            momentum_scale = np.array([a.momentum_scale for a in self.executed])
            skipped = [row for row, a in enumerate(self.executed) if a.directive is Directive.SKIP]
            for step in range(self._pace):
                measured = step + 1 == self._pace
                if measured:
                    self._probe.before_step()
                self.runs.update(lr_scale, momentum_scale, skipped if step == 0 else ())
                if measured:
                    self._probe.after_step()
                self.runs.backward()

    def left_alone(self, rows: Sequence[int]) -> FloatArray:
        """Held-out losses at which the runs in `rows` end if left alone, or to their rules; nothing here moves.

        Returns:
            Shape (len(rows),), nats per token.
        """
        twin = copy.copy(self)
        twin.runs = self.runs.take(rows)
        twin._probe = self._probe.take(rows, twin.runs.fleet)
        twin._rules = None if self._rules is None else [copy.deepcopy(self._rules[row]) for row in rows]
        twin._proposals, twin.executed = (
            [actions[row] for row in rows] for actions in (self._proposals, self.executed)
        )
        twin._proposed = self._proposed[list(rows)].copy()
        horizon = twin.runs.data.tasks.horizon
        losses = twin.runs.held_out_losses()
        while (running := twin.runs.step < horizon).any():
            twin.command(None)
            twin.advance()
            if twin._rules is not None:
                twin.telemetry(range(len(rows)))
            losses = np.where(running, twin.runs.held_out_losses(), losses)
        return losses
