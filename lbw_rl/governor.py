"""The governance plane: telemetry in, bounded action out, around every `optimizer.step()`."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args

import torch

from lbw_rl.action import NEUTRAL, Action, Directive
from lbw_rl.actuator import Actuator
from lbw_rl.authority import Authority, Enforcer, Ruling
from lbw_rl.controller import Context, Controller
from lbw_rl.device import DeviceSource
from lbw_rl.observer import Observer
from lbw_rl.probe import Probe
from lbw_rl.recorder import Recorder, brief, unbrief
from lbw_rl.registry import load_controller
from lbw_rl.signals import NAN, Telemetry
from lbw_rl.snapshot import Snapshot

Mode = Literal["govern", "shadow", "off"]

# Two governors' restores would interleave and leave a scale in place for the scheduler to compound.
_GOVERNED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


class Governor:
    """Governs an optimizer from above: its update rule, the loss, the gradients and the data stay as they are.

    Attaches through the optimizer's own step hooks, so the training loop keeps its calls. No fault of
    governance (controller, probe, ledger, device) reaches the loop: it is counted, logged once a kind, and the
    step runs ungoverned.

    Args:
        optimizer: any `torch.optim.Optimizer`, already built.
        controller: a name (see `load_controller`), a `Controller`, or the folder of a frozen policy.
        model: its output's `.loss` and the size of its `input_ids` are read when the caller does not `observe`.
        authority: bounds of what the controller may do.
        total_steps: optimizer steps planned; None if unknown.
        mode: "govern"; "shadow" decides and logs but changes nothing; "off" does nothing at all.
        ledger: file to append one JSON line per decision to.
        decide_every: optimizer steps per decision; a frozen policy brings its own.
        seed: for controllers that draw random numbers.
        device_index: which GPU NVML reads.
        snapshot_bytes: host memory for the last good state, used only where the authority allows rollbacks.

    Raises:
        ValueError: an unknown mode or controller, `total_steps` or `decide_every` below 1, or an optimizer that
            another governor still governs.

    The learning rate seen by schedulers and loggers is always the scheduled one: the scale lives only inside
    the step. A rollback restores weights and optimizer state; the data goes on, and the batch at hand is skipped.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        controller: str | Path | Controller = "lbw-guard",
        *,
        model: torch.nn.Module | None = None,
        authority: Authority | None = None,
        total_steps: int | None = None,
        mode: Mode = "govern",
        ledger: str | Path | None = None,
        decide_every: int = 1,
        seed: int = 0,
        device_index: int = 0,
        snapshot_bytes: int = 2 << 30,
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode: {mode!r} is unknown; accepted: {', '.join(get_args(Mode))}")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps: {total_steps} must be at least 1, or None if unknown")
        if decide_every < 1:
            raise ValueError(f"decide_every: {decide_every} must be at least 1")
        if mode == "govern" and optimizer in _GOVERNED:
            raise ValueError("optimizer: another governor governs it; accepted: close() that one first")
        self.optimizer = optimizer
        self.controller = load_controller(controller)
        self.authority = authority or Authority()
        self.mode = mode
        self.context = Context(
            total_steps=total_steps,
            decide_every=self.controller.decide_every or decide_every,
            authority=self.authority,
            seed=seed,
        )
        self.controller.reset(self.context)
        self.step = 0
        self.last_telemetry = Telemetry()
        self.last_ruling = Ruling(NEUTRAL)
        self._held = NEUTRAL  # what every step of the present window executes
        self.executed = NEUTRAL
        self._enforcer = Enforcer(self.authority)
        self._overhead = 0.0
        self._probe = Probe(optimizer)
        self._actuator = Actuator(optimizer)
        self._observer = Observer(model if mode != "off" else None)
        self._device = DeviceSource(device_index) if mode != "off" else None
        self._snapshot = (
            Snapshot(optimizer, snapshot_bytes) if self.authority.max_rollbacks and mode == "govern" else None
        )
        self._recorder = Recorder(ledger if mode != "off" else None, self._header())
        self._stepping: FrameType | None = None  # the optimizer's step that is under way
        self._handles: list[Any] = []
        if mode != "off":
            self._handles = [
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            ]
        if mode == "govern":
            _GOVERNED.add(optimizer)

    def observe(
        self,
        loss: torch.Tensor | float | None = None,
        *,
        grad_norm: torch.Tensor | float | None = None,
        tokens: int | None = None,
    ) -> None:
        """Tells the governor what the loop knows; never forces a host sync.

        Args:
            loss: this micro-batch's training loss (nats per token).
            grad_norm: global gradient norm before clipping: what `clip_grad_norm_` returned. Without it the norm
                is taken from the gradients that the optimizer gets.
            tokens: training tokens of this micro-batch; by default the size of the model's `input_ids`.
        """
        if not self._handles:  # off, or closed
            return
        start = time.perf_counter()
        if loss is not None:
            self._observer.loss(loss)
        if grad_norm is not None:
            self._observer.grad_norm = grad_norm.detach() if isinstance(grad_norm, torch.Tensor) else grad_norm
        if tokens is not None:
            self._observer.tokens(tokens)
        self._overhead += time.perf_counter() - start

    # --- around the step ---------------------------------------------------------------------------------

    def _before(self, *_: Any) -> None:
        if self._within_step():
            return
        self._stepping = sys._getframe(1)
        start = time.perf_counter()
        try:
            self._actuator.restore()  # a step that raised never reached its post hook
            action = self._decide() if self.step % self.context.decide_every == 0 else self._held
            self._execute(action)
        except Exception as e:  # fail-open: the step must run
            self._fault("governor", e)
            self._let_go()
        self._overhead += time.perf_counter() - start

    def _after(self, *_: Any) -> None:
        if sys._getframe(1) is not self._stepping:
            return
        self._stepping = None
        start = time.perf_counter()
        try:
            self._actuator.restore()
            self._probe.after_step()
        except Exception as e:  # fail-open
            self._fault("probe", e)
        self._observer.step_done()
        self.step += 1
        self._overhead += time.perf_counter() - start

    def _within_step(self) -> bool:
        """Whether this hook runs inside the step at hand: a subclass whose `step` calls `super().step()` has two.

        A step that raised never reached its post hook either; it is told apart by having left the stack.
        """
        frame: FrameType | None = sys._getframe(2) if self._stepping is not None else None
        while frame is not None and frame is not self._stepping:
            frame = frame.f_back
        return frame is not None

    def _decide(self) -> Action:
        telemetry = self.last_telemetry = self._telemetry()
        proposed, fault = None, None
        if not self._enforcer.suspended:
            try:
                proposed = self.controller.act(telemetry)
            except Exception as e:  # a broken controller loses its say, not the run
                fault = f"{type(e).__name__}: {e}"
                self._fault("controller", e)
        ruling = self.last_ruling = self._enforcer.rule(proposed, fault, restorable=self._can_roll_back())
        action = ruling.action
        self._recorder.count(action)
        if self.mode == "shadow":
            self._recorder.write(
                self.step, telemetry, proposed, NEUTRAL, (*ruling.reasons, "shadow mode"), would=action
            )
            return NEUTRAL
        self._recorder.write(self.step, telemetry, proposed, action, ruling.reasons)
        self._keep_last_good(telemetry, action)
        # A skip is for this step only; the scales hold for the whole window.
        self._held = Action(lr_scale=action.lr_scale, momentum_scale=action.momentum_scale)
        return action

    def _execute(self, action: Action) -> None:
        if action.directive is Directive.ROLLBACK and self._snapshot is not None:
            self._snapshot.restore()
        self._actuator.apply(action)
        self.executed = action
        if (self.step + 1) % self.context.decide_every == 0 and action.directive is Directive.PROCEED:
            try:
                self._probe.before_step()
            except Exception as e:  # an update that cannot be measured is executed all the same
                self._fault("probe", e)

    def _let_go(self) -> None:
        """Executes the neutral action, within the slew limit; where even that fails, nothing."""
        self._actuator.restore()
        self.executed = NEUTRAL if self.mode == "shadow" else self._enforcer.let_go(self.executed.lr_scale)
        try:
            self._actuator.apply(self.executed)
        except Exception as e:  # the optimizer cannot be written to at all
            self._fault("actuator", e)
            self._actuator.restore()
            self.executed = NEUTRAL

    def _can_roll_back(self) -> bool:
        if self.mode == "shadow":
            return True  # it records what would have been done
        return self._snapshot is not None and self._snapshot.step is not None

    def _telemetry(self) -> Telemetry:
        total = self.context.total_steps
        values = {
            "step": float(self.step),
            "progress": min(1.0, self.step / total) if total else NAN,
            "learning_rate": _scheduled_lr(self.optimizer),
            "lr_scale": self.executed.lr_scale,
            "momentum_scale": self.executed.momentum_scale,
        }
        loss, grad_norm, clock = self._observer.collect()
        values.update(clock)
        try:
            values.update(self._probe.measure(loss, grad_norm))
        except Exception as e:  # a signal that cannot be measured is missing, no more
            self._fault("probe", e)
        if self._device is not None:
            try:
                values.update(self._device.read())
            except Exception as e:
                self._fault("device", e)
        return Telemetry(**values)

    def _header(self) -> dict[str, Any]:
        """What a replay has to know about the run."""
        context = {
            "total_steps": self.context.total_steps,
            "decide_every": self.context.decide_every,
            "authority": self.authority.model_dump(),
            "seed": self.context.seed,
        }
        return {"controller": self.controller.name, "mode": self.mode, "context": context}

    def _keep_last_good(self, telemetry: Telemetry, action: Action) -> None:
        snapshot = self._snapshot
        if snapshot is None or telemetry.nonfinite or action.directive is not Directive.PROCEED:
            return
        due = snapshot.step is None or self.step - snapshot.step >= self.authority.snapshot_every
        if due and action.regime in HEALTHY_REGIMES and not snapshot.take(self.step):
            self._fault(
                "snapshot",
                MemoryError(f"{snapshot.bytes_needed():,} bytes needed, {snapshot.byte_budget:,} allowed"),
            )
            self._snapshot = None

    def _fault(self, where: str, error: Exception) -> None:
        self._recorder.fault(where, error, self.step)

    # --- state -------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """What governance did so far.

        Returns:
            `decisions`, `interventions` (decisions whose executed action was not neutral), `skips`, `rollbacks`,
            `suspended`, `faults` (where → count), `overhead_seconds` spent in governance, `regimes` (name →
            decisions), `controller` (its own counters). In shadow mode: what would have been executed.
        """
        try:
            own = self.controller.summary()
        except Exception as e:
            self._fault("controller", e)
            own = {}
        return {
            **{key: self._recorder.counts[key] for key in ("decisions", "interventions", "skips", "rollbacks")},
            "suspended": self._enforcer.suspended,
            "faults": dict(self._recorder.faults),
            "overhead_seconds": self._overhead,
            "regimes": dict(self._recorder.regimes),
            "controller": own,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next decision depends on: JSON data and tensors."""
        return {
            "step": self.step,
            "controller": self.controller.state_dict(),
            "enforcer": self._enforcer.state_dict(),
            "probe": self._probe.state_dict(),
            "observer": self._observer.state_dict(),
            "held": brief(self._held),
            "executed": brief(self.executed),
            "recorder": self._recorder.state_dict(),
            "overhead_seconds": self._overhead,
            "snapshot": self._snapshot.state_dict() if self._snapshot is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`; call it after the optimizer's own state has been loaded."""
        self.step = state["step"]
        self.controller.load_state_dict(state["controller"])
        self._enforcer.load_state_dict(state["enforcer"])
        self._probe.load_state_dict(state["probe"])
        self._observer.load_state_dict(state["observer"])
        self.executed = unbrief(state["executed"])
        # The state may come from a run with wider authority, or from one that was not in shadow mode.
        held = self.authority.clip(unbrief(state["held"]), self.executed.lr_scale)[0]
        self._held = held if self.mode == "govern" else NEUTRAL
        self._recorder.load_state_dict(state["recorder"])
        self._overhead = state["overhead_seconds"]
        if self._snapshot is not None and state["snapshot"] is not None:
            self._snapshot.load_state_dict(state["snapshot"])

    def close(self) -> None:
        """Lets go of the optimizer and the model; the run continues ungoverned. Safe to call twice."""
        self._actuator.restore()
        if self._handles and self.mode == "govern":
            _GOVERNED.discard(self.optimizer)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._observer.close()
        if self._device is not None:
            self._device.close()
        self._recorder.close(self.step)

    def __enter__(self) -> Governor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


HEALTHY_REGIMES = frozenset({"steady", "calibrating", "annealing", "raising", "holding-back", "learned"})
"""Regimes in which a state may be kept as the last good one."""


def _scheduled_lr(optimizer: torch.optim.Optimizer) -> float:
    lr = optimizer.param_groups[0].get("lr", NAN)
    return float(lr)
