"""The governance plane: telemetry in, bounded action out, around every `optimizer.step()`."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lbw_rl import votes
from lbw_rl.action import NEUTRAL, Action, Directive
from lbw_rl.actuator import Actuator
from lbw_rl.authority import Authority
from lbw_rl.controller import Context, Controller
from lbw_rl.device_guard import DeviceGuard
from lbw_rl.enforcer import Enforcer, Ruling
from lbw_rl.exchange import PeerLostError, exchange_for
from lbw_rl.hand_over import impossible
from lbw_rl.last_good import LastGood
from lbw_rl.ledger import ledger_of_rank
from lbw_rl.measurement import Measured, Measurement
from lbw_rl.recorder import Recorder, brief, unbrief
from lbw_rl.registry import load_controller
from lbw_rl.sgd_rate import SgdRate, largest_beta1, rate_on_host
from lbw_rl.signals import NAN, Telemetry
from lbw_rl.sinks.sink import Decision, GuardedSinks, Sink
from lbw_rl.snapshot import Snapshot, Stateful
from lbw_rl.stages import Mode, Switch, check_mode
from lbw_rl.step_hooks import StepHooks
from lbw_rl.time_limit import TimeLimit

log = logging.getLogger("lbw_rl")

# Two governors' restores would interleave and leave a scale in place for the scheduler to compound.
_GOVERNED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

_COUNTED = ("decisions", "interventions", "skips", "rollbacks", "hand_overs")


class Governor:
    """Governs an optimizer from above: its update rule, the loss, the gradients and the data stay as they are.

    Attaches through the optimizer's own step hooks, so the training loop keeps its calls. No fault of
    governance (controller, probe, ledger, device) reaches the loop: it is counted, logged once a kind, and the
    step runs ungoverned. Under `torch.distributed` every rank builds its governor alike; all decide from the same
    numbers, joined in one collective per decision.

    Args:
        optimizer: any `torch.optim.Optimizer`, already built.
        controller: a name (see `load_controller`), a `Controller`, or the folder of a frozen policy.
        model: its output's `.loss` and the size of its `input_ids` are read when the caller does not `observe`; its
            buffers belong to snapshots. A compiled model is passed as `torch.compile` returned it.
        authority: bounds of what the controller may do.
        total_steps: optimizer steps planned; None if unknown.
        mode: how much of the authority is in use: "govern" all of it; "lr" no rollbacks; "skip" skips only; "shadow"
            decides and logs but changes nothing; "off" does nothing at all. See `set_mode`, `control`.
        ledger: file to append one JSON line per decision to; with ranks, rank r > 0 writes `NAME.rank<r>.jsonl`.
        decide_every: optimizer steps per decision; a frozen policy brings its own.
        seed: for controllers that draw random numbers.
        stateful: name → what a rollback puts back besides weights and optimizer: `{"scheduler": …, "scaler": …}`. The
            scaler's factor is then a signal too.
        snapshot_bytes: host memory for the last good state, used only where authority and mode allow rollbacks.
        control: a file that may hold a mode; written while the run goes on, it changes the mode at the next decision.
        kill_signal: for instance `signal.SIGUSR1`; at the next step (with ranks: the next decision) the governor lets go
            for good and says so.
        measure_device: whether clock and device are measured; without them, same seed, same ledger.
        device_index: which GPU NVML reads, as CUDA counts them; None means 0.
        late: whether a decision uses the values of the one before, so that nothing waits for the device, and poisoned
            updates are withheld on the device; None: on accelerators only.
        process_group: the ranks that train together; None: the default group, where there is one.
        collective_timeout: seconds after which a silent rank counts as lost.
        sinks: told of every decision, on the first rank, as long as the governor is not closed; see `lbw_rl.sinks`.

    Raises:
        ValueError: an unknown mode or controller, `total_steps` or `decide_every` below 1, an optimizer that another
            governor still governs, or ranks that were set up differently.
        PeerLostError: from `optimizer.step()`: a rank is gone. Going on would let the ranks' weights drift apart.

    The learning rate seen by schedulers and loggers is always the scheduled one: the scale lives only inside
    the step. A rollback restores the last good state; the data goes on, and the batch at hand is skipped.
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
        stateful: Mapping[str, Stateful] | None = None,
        snapshot_bytes: int = 2 << 30,
        control: str | Path | None = None,
        kill_signal: int | None = None,
        measure_device: bool = True,
        device_index: int | None = None,
        late: bool | None = None,
        process_group: Any = None,
        collective_timeout: float = 600.0,
        sinks: Sequence[Sink] = (),
    ) -> None:
        check_mode(mode)
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps: {total_steps} must be at least 1, or None if unknown")
        if decide_every < 1:
            raise ValueError(f"decide_every: {decide_every} must be at least 1")
        self.optimizer = optimizer = _unwrapped(optimizer)
        if mode not in ("off", "shadow") and optimizer in _GOVERNED:
            raise ValueError("optimizer: another governor governs it; accepted: close() that one first")
        self.controller = load_controller(controller)
        self.authority = authority or Authority()
        self.context = Context(
            total_steps=total_steps,
            decide_every=self.controller.decide_every or decide_every,
            authority=self.authority,
            seed=seed,
            groups=tuple(str(g.get("name", i)) for i, g in enumerate(optimizer.param_groups)),
        )
        self.controller.reset(self.context)
        self.step = 0
        self.last_telemetry = Telemetry()
        self.last_ruling = Ruling(NEUTRAL)
        self._held = NEUTRAL  # what every step of the present window executes
        self.executed = NEUTRAL
        self._enforcer = Enforcer(self.authority, mode)
        self._overhead = 0.0
        self._actuator = Actuator(optimizer, self._fault)
        self._sgd_rate = SgdRate()
        self._guard = DeviceGuard(optimizer)
        limit = self.controller.time_limit
        self._time_limit = TimeLimit(limit) if limit is not None else None
        self._stateful: dict[str, Stateful] = {
            "controller": self.controller,
            "sgd_rate": self._sgd_rate,
            **(stateful or {}),
        }
        self._last_good = LastGood(
            Snapshot(optimizer, snapshot_bytes, model, self._stateful), self.authority, self._fault
        )
        self._ahead: Measured | None = None
        self._hooks: StepHooks | None = None
        self._restorable = self._armed = False
        exchange = exchange_for(process_group, collective_timeout) if mode != "off" else None
        self._rank = exchange.rank if exchange is not None else 0
        self.ranks = exchange.world if exchange is not None else 1
        self._recorder = Recorder(ledger_of_rank(ledger, self._rank) if mode != "off" else None, self._header())
        self._measurement: Measurement | None = None
        self._switch: Switch | None = None
        self._sinks = GuardedSinks(self._fault)
        if mode == "off":
            if sinks:
                log.warning("mode off measures nothing: %s get nothing", ", ".join(sink.name for sink in sinks))
            return
        if exchange is not None:
            exchange.agree({**self._header(), "collective_timeout": collective_timeout})
        self._switch = Switch(control, kill_signal)  # may refuse, before anything is attached
        first = next((p for group in optimizer.param_groups for p in group["params"]), None)
        self._measurement = Measurement(
            optimizer,
            model,
            self._fault,
            exchange=exchange,
            late=late if late is not None else first is not None and first.device.type != "cpu",
            device_index=device_index,
            clock_and_device=measure_device,
            scaler=self._stateful.get("scaler"),
            group_entropy=self.controller.group_entropy,
        )
        self._hooks = StepHooks(optimizer, self._hold, self._begin, self._again, self._end, self._put_back)
        # A checkpoint written while an exception of a step is handled must hold the scheduled rate.
        self._saving = optimizer.register_state_dict_pre_hook(lambda _: self._put_back_after_a_raise())
        if mode != "shadow":
            _GOVERNED.add(optimizer)
        if self._rank == 0:
            self._sinks.open(sinks, self)

    @property
    def mode(self) -> Mode:
        """How much of the authority is in use now."""
        return self._enforcer.mode

    def set_mode(self, mode: Mode) -> None:
        """Asks for another mode, executed at the next decision; with ranks, by all of them together.

        "off" is for good: the governor lets go and takes its hooks off.

        Raises:
            ValueError: an unknown mode.
        """
        check_mode(mode)
        if self._switch is not None:
            self._switch.ask(mode, "set_mode")

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
            grad_norm: global gradient norm before clipping: what `clip_grad_norm_` returned. Without it the norm is
                taken from the call of `torch.nn.utils.clip_grad_norm_` itself, else from the gradients that the
                optimizer gets.
            tokens: training tokens of this micro-batch; by default the size of the model's `input_ids`.
        """
        if self._measurement is None:  # off, or closed
            return
        start = time.perf_counter()
        observer = self._measurement.observer
        if loss is not None:
            observer.loss(loss)
        if grad_norm is not None:
            observer.grad_norm(grad_norm)
        if tokens is not None:
            observer.tokens(tokens)
        self._overhead += time.perf_counter() - start

    def measure(self) -> Telemetry:
        """The telemetry of the decision to come, which then uses it: for an agent that has to see before it acts."""
        if self._ahead is None:
            self._ahead = self._take()
        return self._ahead.telemetry

    # --- around the step ---------------------------------------------------------------------------------

    def _hold(self) -> None:
        """LBFGS reads its rate before its closure brings the gradients that a decision needs: it gets the last one's."""
        if not isinstance(self.optimizer, torch.optim.LBFGS):
            return
        try:
            self._actuator.apply(self._held)
        except Exception as e:
            self._fault("actuator", e)
            self._put_back()

    def _begin(self, closure_result: Any) -> None:
        start = time.perf_counter()
        try:
            self._put_back()  # a step that raised may have left something
            if self._measurement is not None:
                self._measurement.observer.closure_loss(closure_result)
            action = self._decide() if self.step % self.context.decide_every == 0 else self._between()
            if self._measurement is not None:  # a decision may have switched governance off
                self._execute(action)
        except PeerLostError:
            raise
        except Exception as e:  # fail-open: the step must run
            self._fault("governor", e)
            self._let_go()
        self._overhead += time.perf_counter() - start

    def _again(self) -> None:
        """A line search has brought new gradients: a withheld step withholds them too."""
        try:
            if self.executed.directive is not Directive.PROCEED or self.executed.hand_over:  # which has moved already
                self._actuator.apply(Action(directive=Directive.SKIP))
        except Exception as e:
            self._fault("actuator", e)

    def _put_back(self) -> None:
        """Leaves nothing of a step's action behind; the hooks tell when a step that raised is gone."""
        try:
            self._guard.disarm()
            self._actuator.restore()
        except Exception as e:
            self._fault("actuator", e)

    def _put_back_after_a_raise(self) -> None:
        if self._hooks is not None and not self._hooks.within_step():
            self._put_back()

    def _end(self) -> None:
        start = time.perf_counter()
        self._put_back()
        try:
            if self._measurement is not None:
                self._measurement.probe.after_step()
        except Exception as e:  # fail-open
            self._fault("probe", e)
        if self._measurement is not None:
            self._measurement.observer.step_done()
        self.step += 1
        self._overhead += time.perf_counter() - start

    def _decide(self) -> Action:
        measured, self._ahead = self._ahead or self._take(), None
        telemetry = self.last_telemetry = measured.telemetry
        self._settle(measured.votes)
        if self.mode == "off":
            return NEUTRAL
        self._sgd_rate.update(telemetry, largest_beta1(self.optimizer))
        proposed, fault = None, None
        if not self._enforcer.suspended:
            try:
                act = self.controller.act
                proposed = act(telemetry) if self._time_limit is None else self._time_limit(act, telemetry)
            except Exception as e:  # a broken controller loses its say, not the run
                fault = f"{type(e).__name__}: {e}"
                self._fault("controller", e)
        ruling = self.last_ruling = self._enforcer.rule(
            proposed,
            fault,
            restorable=self._restorable,
            groups=len(self.optimizer.param_groups),
            late=measured.late,
            no_hand_over=self._no_hand_over(proposed),
        )
        action = ruling.action
        withheld = measured.late and telemetry.nonfinite == 1 and self._armed  # on the device, a decision ago
        if withheld:
            self._recorder.counts["skips"] += 1
            self._enforcer.note_skip()
        self._recorder.count(action)
        executed = NEUTRAL if self.mode == "shadow" else action
        if withheld or executed.directive is not Directive.PROCEED:
            self._sgd_rate.withheld()
        extra: dict[str, Any] = {"would_execute": brief(action)} if self.mode == "shadow" else {}
        if len(measured.nonfinite_ranks) and self._measurement is not None and self._measurement.exchange is not None:
            extra["nonfinite_ranks"] = list(measured.nonfinite_ranks)
        if executed.directive is Directive.ROLLBACK:
            extra["restored_step"] = self._last_good.step
            extra["lost_steps"] = [self._last_good.step, self.step]  # their batches are spent, and not seen again
        if withheld:
            extra["withheld_on_device"] = True
        if action.hand_over:
            extra["sgd_rate"] = self._sgd_rate.value
        reasons = (*ruling.reasons, *(("shadow mode",) if self.mode == "shadow" else ()))
        self._recorder.write(self.step, telemetry, proposed, executed, action, reasons, extra)
        if self._sinks:
            self._tell_sinks(proposed, executed, reasons)
        self._last_good.offer(self.step, telemetry, executed, self.mode)
        # A skip is for this step only; the scales hold for the whole window.
        self._held = Action(
            lr_scale=executed.lr_scale,
            group_lr_scales=executed.group_lr_scales,
            momentum_scale=executed.momentum_scale,
            hand_over=executed.hand_over,
        )
        return executed

    def _no_hand_over(self, proposed: Any) -> str | None:
        if not isinstance(proposed, Action) or not proposed.hand_over:
            return None  # nobody asks
        return impossible(self.optimizer) or self._sgd_rate.unknown

    def _tell_sinks(self, proposed: Any, executed: Action, reasons: tuple[str, ...]) -> None:
        spent = self.authority.max_skips > 0 and not self._enforcer.may_skip()
        decision = Decision(
            step=self.step,
            telemetry=self.last_telemetry,
            proposed=proposed if isinstance(proposed, Action) else None,
            ruled=self.last_ruling.action,
            executed=executed,
            reasons=reasons,
            suspended=self._enforcer.suspended,
            skip_budget_spent=spent,
            overhead_seconds=self._overhead,
            **self._recorder.totals(),
        )
        self._sinks.decided(decision)

    def _between(self) -> Action:
        """The action of a step between two decisions: that of the window, unless this step alone is poisoned."""
        assert self._measurement is not None
        if self._switch is not None and self._switch.killed and self._measurement.exchange is None:
            self._change_mode(*(self._switch.take() or ("off", "")))
            return NEUTRAL
        self._measurement.flag_between()
        if self.mode in ("shadow", "off") or not self._measurement.poisoned_now() or not self._enforcer.may_skip():
            return self._held
        self._enforcer.note_skip()
        self._recorder.counts["skips"] += 1
        self._recorder.event("skip", self.step, {"regime": "non-finite"})
        return replace(self._held, directive=Directive.SKIP, regime="non-finite")

    def _execute(self, action: Action) -> None:
        assert self._measurement is not None
        if action.directive is Directive.ROLLBACK:
            self._last_good.restore()
            self._measurement.probe.forget()
            self._measurement.rate_meter.forget()
            try:
                self.controller.rolled_back()
            except Exception as e:
                self._fault("controller", e)
        if self._measurement is None:  # the controller has closed it
            return
        bad, self._measurement.bad = self._measurement.bad, None
        arm = bad is not None and self.mode != "shadow" and self._enforcer.may_skip()
        if self.step % self.context.decide_every == 0:  # what the next decision's telemetry will speak of
            self._armed = arm
        if bad is not None and arm:
            self._guard.arm(bad, by_gradients=action.hand_over)
        if (self.step + 1) % self.context.decide_every == 0 and action.directive is Directive.PROCEED:
            try:  # first: a step that is handed over moves the weights
                self._measurement.probe.before_step()
            except Exception as e:  # an update that cannot be measured is executed all the same
                self._fault("probe", e)
        self._actuator.apply(action, self._sgd_rate.value)
        self.executed = action
        try:
            self._measurement.rate_meter.executed(action)
        except Exception as e:
            self._fault("probe", e)

    def _let_go(self) -> None:
        """Executes the neutral action, within the slew limit; where even that fails, nothing."""
        if self._measurement is None:  # closed meanwhile: nobody would put the scale back
            self.executed = self._held = NEUTRAL
            return
        self._put_back()
        self._measurement.rate_meter.forget()
        self.executed = self._held = NEUTRAL if self.mode == "shadow" else self._enforcer.let_go(self.executed.lr_scale)
        try:
            self._actuator.apply(self.executed)
        except Exception as e:  # the optimizer cannot be written to at all
            self._fault("actuator", e)
            self._put_back()
            self.executed = NEUTRAL

    # --- what it sees, and who agrees --------------------------------------------------------------------

    def _take(self) -> Measured:
        if self._measurement is None:
            return Measured(Telemetry())
        total = self.context.total_steps
        known = {
            "step": float(self.step),
            "progress": min(1.0, self.step / total) if total else NAN,
            "learning_rate": rate_on_host(self.optimizer.param_groups[0]),  # else the probe brings it along
            "lr_scale": self.executed.lr_scale,
            "momentum_scale": self.executed.momentum_scale,
        }
        return self._measurement.take(known, self._vote(), self.step)

    def _vote(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        wish = self._switch.take() if self._switch is not None else None
        self._wished_by = wish[1] if wish is not None else "another rank"
        return votes.cast(wish[0] if wish else None, self._recorder.digest, self._last_good.step is not None)

    def _settle(self, ranks: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        wish, alike, restorable = votes.count(ranks)
        if wish is not None:
            self._change_mode(wish, self._wished_by)
        if not alike and not self._enforcer.suspended:
            self._enforcer.suspend()
            self._fault("ranks", RuntimeError("the ranks' last decisions differ; the controller is suspended on all"))
        self._restorable = self.mode == "shadow" or restorable  # shadow mode records what would have been done

    def _change_mode(self, mode: Mode, by: str) -> None:
        before, scale = self.mode, self.executed.lr_scale
        if mode == before:
            return
        governs = mode not in ("off", "shadow")
        if governs and before == "shadow":
            if self.optimizer in _GOVERNED:
                log.warning("mode %s asked for by %s at step %d: another governor governs", mode, by, self.step)
                return
            _GOVERNED.add(self.optimizer)
        elif not governs and before != "shadow":
            _GOVERNED.discard(self.optimizer)
        self._enforcer.set_mode(mode)
        self._recorder.event("mode", self.step, {"from": before, "to": mode, "by": by})
        log.warning("governance at step %d: mode %s -> %s (%s); lr_scale was %.4g", self.step, before, mode, by, scale)
        if mode in ("off", "shadow", "skip"):
            self._held = self.executed = NEUTRAL
        if mode == "off":
            self._detach()

    def _header(self) -> dict[str, Any]:
        """What a replay has to know about the run, and the ranks have to agree on."""
        context = {
            "total_steps": self.context.total_steps,
            "decide_every": self.context.decide_every,
            "authority": self.authority.model_dump(),
            "seed": self.context.seed,
            "groups": list(self.context.groups),
        }
        return {"controller": self.controller.name, "mode": self.mode, "context": context}

    def _fault(self, where: str, error: Exception) -> None:
        self._recorder.fault(where, error, self.step)

    # --- state -------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """What governance did so far.

        Returns:
            `decisions`, `interventions` (decisions whose executed action was not neutral), `skips`, `rollbacks`,
            `hand_overs` (decisions to run as SGD), `suspended`, `faults` (where → count), `overhead_seconds` spent in
            governance, `regimes` (name → decisions), `mode`, `controller` (its own counters). In shadow mode: what would have been executed.
        """
        try:
            own = self.controller.summary()
        except Exception as e:
            self._fault("controller", e)
            own = {}
        return {
            **{key: self._recorder.counts[key] for key in _COUNTED},
            "suspended": self._enforcer.suspended,
            "faults": dict(self._recorder.faults),
            "overhead_seconds": self._overhead,
            "regimes": dict(self._recorder.regimes),
            "mode": self.mode,
            "controller": own,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next decision depends on: JSON data and tensors."""
        return {
            "step": self.step,
            "mode": self.mode,
            "rank": self._rank,
            "controller": self.controller.state_dict(),
            "enforcer": self._enforcer.state_dict(),
            "sgd_rate": self._sgd_rate.state_dict(),
            "measurement": self._measurement.state_dict() if self._measurement is not None else None,
            "armed": self._armed,
            "held": brief(self._held),
            "executed": brief(self.executed),
            "recorder": self._recorder.state_dict(),
            "overhead_seconds": self._overhead,
            "snapshot": self._last_good.snapshot.state_dict() if self._last_good.step is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`; call it after the optimizer's own state has been loaded.

        The mode stays as it is, but a governor that had been told to let go lets go again: to govern such a run,
        start without its governor's state.

        With ranks it may be the state of another one, where only one of them saves.
        """
        own = state["rank"] == self._rank
        self.step = state["step"]
        self.controller.load_state_dict(state["controller"])
        self._enforcer.load_state_dict(state["enforcer"])
        self._sgd_rate.load_state_dict(state["sgd_rate"])
        if self._measurement is not None and state["measurement"] is not None:
            self._measurement.load_state_dict(state["measurement"], own=own)
        self.executed = unbrief(state["executed"])
        # The state may come from a run with wider authority, or from one in another mode.
        held = self.authority.clip(unbrief(state["held"]), self.executed.lr_scale)[0]
        self._ahead = None
        self._armed = state["armed"]
        self._held = held if self.mode in ("lr", "govern") else NEUTRAL
        self._recorder.load_state_dict(state["recorder"])
        self._overhead = state["overhead_seconds"]
        shards_of_another = not own and self._measurement is not None and self._measurement.probe.sharded
        if state["snapshot"] is not None and not shards_of_another:
            self._last_good.snapshot.load_state_dict(state["snapshot"])
        else:
            self._last_good.snapshot.drop()  # one of another history
        if self._measurement is None or state["mode"] == self.mode:
            return
        if state["mode"] == "off":
            log.warning("governance was let go before the checkpoint at step %d; it stays off", self.step)
            self._enforcer.set_mode("off")
            _GOVERNED.discard(self.optimizer)
            self._detach()
        else:
            self._recorder.event("mode", self.step, {"from": state["mode"], "to": self.mode, "by": "resume"})

    def flush(self) -> None:
        """Brings the ledger to the disk, for a checkpoint that must not be ahead of it."""
        self._recorder.flush(self.step)

    def close(self) -> None:
        """Lets go of the optimizer and the model; the run continues ungoverned. Safe to call twice."""
        self._detach()
        self._sinks.close()

    def _detach(self) -> None:
        self._put_back()
        if self._hooks is not None:
            self._hooks.remove()
            self._saving.remove()
        if self._measurement is not None and self.mode != "shadow":
            _GOVERNED.discard(self.optimizer)
        if self._measurement is not None:
            self._measurement.close()
            self._measurement = None
        if self._switch is not None:
            self._switch.close()
            self._switch = None
        if self._time_limit is not None:
            self._time_limit.close()
        self._recorder.close(self.step)

    def __enter__(self) -> Governor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer whose hooks fire: Accelerate's and Lightning's wrappers only pass their steps on."""
    # By what they lack, not by name: Lightning's takes on the name of the class that it wraps.
    while "_optimizer_step_pre_hooks" not in getattr(optimizer, "__dict__", {}) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer: {type(optimizer).__name__} is none; accepted: a torch.optim.Optimizer")
    return optimizer
