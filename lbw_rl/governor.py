"""The governance plane: telemetry in, bounded action out, around every `optimizer.step()`."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lbw_rl import votes
from lbw_rl.account import Account
from lbw_rl.action import NEUTRAL, Action, Directive
from lbw_rl.authority import Authority
from lbw_rl.claim import Claim, unwrapped
from lbw_rl.controller import Context, Controller
from lbw_rl.deliberation import Deliberation
from lbw_rl.enforcer import Enforcer, Ruling
from lbw_rl.exchange import PeerLostError, exchange_for
from lbw_rl.execution import Execution
from lbw_rl.last_good import LastGood
from lbw_rl.leading_group import LeadingGroup
from lbw_rl.ledger import ledger_of_rank
from lbw_rl.measurement import Measured, Measurement
from lbw_rl.momentum import scheduled_momentum
from lbw_rl.recorder import Recorder, brief, run_header, unbrief
from lbw_rl.registry import load_controller
from lbw_rl.sgd_rate import SgdRate, rate_on_host
from lbw_rl.signals import NAN, Telemetry
from lbw_rl.sinks.sink import GuardedSinks, Sink
from lbw_rl.snapshot import Snapshot, Stateful
from lbw_rl.stages import Mode, Switch, check_mode, governs
from lbw_rl.step_hooks import StepHooks
from lbw_rl.trainable import trainable

log = logging.getLogger("lbw_rl")

_COUNTED = ("decisions", "interventions", "skips", "rollbacks", "hand_overs")


def _whole(name: str, value: Any, least: int) -> int:
    """A plain int of whatever is one: numpy's and torch's are no JSON data."""
    try:
        whole = operator.index(int(value) if isinstance(value, float) and value.is_integer() else value)
    except TypeError:
        whole = least - 1
    if whole < least:
        raise ValueError(f"{name}: {value!r} is not accepted; accepted: a whole number, at least {least}")
    return whole


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
        ValueError: an unknown mode or controller, `total_steps`, `decide_every` or `seed` that is no whole number or too
            small, an optimizer that another governor still governs, or ranks that were set up differently.
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
        authority: Authority | Mapping[str, Any] | None = None,
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
        if total_steps is not None:
            total_steps = _whole("total_steps", total_steps, 1)
        decide_every, seed = _whole("decide_every", decide_every, 1), _whole("seed", seed, 0)
        self.optimizer = optimizer = unwrapped(optimizer)
        self._claim = Claim(optimizer)
        if governs(mode) and self._claim.refused:
            raise ValueError("optimizer: another governor governs it; accepted: close() that one first")
        self.controller = load_controller(controller)
        self.authority = Authority.of(authority)
        facts = trainable(optimizer)
        self.context = Context(
            total_steps=total_steps,
            decide_every=self.controller.decide_every or decide_every,
            authority=self.authority,
            seed=seed,
            groups=tuple(str(g.get("name", i)) for i, g in enumerate(optimizer.param_groups)),
            weights=facts.weights,
            low_rank=facts.low_rank,
            momentum=facts.momentum,
            normalised=facts.normalised,
        )
        self.controller.reset(self.context)
        self.step = 0
        self.last_telemetry = Telemetry()
        self.last_ruling = Ruling(NEUTRAL)
        self._enforcer = Enforcer(self.authority, mode)
        self._sgd_rate = SgdRate()
        self._deliberation = Deliberation(
            optimizer, self.controller, self._enforcer, self._sgd_rate, self._fault, self.context.decide_every
        )
        self._execution = Execution(optimizer, self._sgd_rate, self._fault)
        moved: dict[str, Stateful] = {
            "controller": self.controller,
            "sgd_rate": self._sgd_rate,
            **(stateful or {}),
        }
        self._last_good = LastGood(Snapshot(optimizer, snapshot_bytes, model, moved), self.authority, self._fault)
        self._overhead = 0.0
        self._armed = False
        self._leading, self._previous_rate = LeadingGroup(optimizer), NAN
        self._ahead: Measured | None = None
        self._hooks: StepHooks | None = None
        self._measurement: Measurement | None = None
        self._switch: Switch | None = None
        exchange = exchange_for(process_group, collective_timeout) if mode != "off" else None
        self._rank = exchange.rank if exchange is not None else 0
        self.ranks = exchange.world if exchange is not None else 1
        header = run_header(self.controller.name, mode, self.context)
        self._recorder = Recorder(ledger_of_rank(ledger, self._rank) if mode != "off" else None, header)
        self._sinks = GuardedSinks(self._fault)
        self._account = Account(self._recorder, self._sinks, self._enforcer, self._sgd_rate)
        if mode == "off":
            if sinks:
                log.warning("mode off measures nothing: %s get nothing", ", ".join(sink.name for sink in sinks))
            return
        if exchange is not None:
            exchange.agree({**header, "collective_timeout": collective_timeout})
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
            scaler=moved.get("scaler"),
            group_entropy=self.controller.group_entropy,
        )
        execution = self._execution
        self._hooks = StepHooks(
            optimizer, execution.before_closure, self._begin, execution.again, self._end, execution.put_back
        )
        # A checkpoint written while an exception of a step is handled must hold the scheduled rate.
        self._saving = optimizer.register_state_dict_pre_hook(lambda _: self._put_back_after_a_raise())
        if governs(mode):
            self._claim.take()
        if self._rank == 0:
            self._sinks.open(sinks, self)

    @property
    def mode(self) -> Mode:
        """How much of the authority is in use now."""
        return self._enforcer.mode

    @property
    def executed(self) -> Action:
        """The action of the latest step."""
        return self._execution.executed

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

    def _begin(self, closure_result: Any) -> None:
        start = time.perf_counter()
        try:
            self._execution.put_back()  # a step that raised may have left something
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

    def _put_back_after_a_raise(self) -> None:
        if self._hooks is not None and not self._hooks.within_step():
            self._execution.put_back()

    def _end(self) -> None:
        start = time.perf_counter()
        self._execution.put_back()
        if self._measurement is not None:
            self._measurement.after_step()
        self.step += 1
        self._overhead += time.perf_counter() - start

    def _decide(self) -> Action:
        measured, self._ahead = self._ahead or self._take(), None
        self.last_telemetry = measured.telemetry
        restorable = self._settle(measured.votes)
        if self.mode == "off":
            return NEUTRAL
        judgement = self._deliberation.judge(measured, restorable=restorable, armed=self._armed)
        self.last_ruling, action = judgement.ruling, judgement.executed
        self._account.enter(self.step, judgement, last_good=self._last_good.step, overhead_seconds=self._overhead)
        self._last_good.offer(self.step, measured.telemetry, action, self.mode)
        self._execution.open_window(action)
        return action

    def _between(self) -> Action:
        """The action of a step between two decisions: that of the window, unless this step alone is poisoned."""
        assert self._measurement is not None
        if self._switch is not None and self._switch.killed and self._measurement.exchange is None:
            self._change_mode(*(self._switch.take() or ("off", "")))
            return NEUTRAL
        self._measurement.flag_between()
        if self.mode in ("shadow", "off") or not self._measurement.poisoned_now() or not self._enforcer.may_skip():
            return self._execution.held
        self._enforcer.note_skip()
        self._recorder.counts["skips"] += 1
        self._recorder.event("skip", self.step, {"regime": "non-finite"})
        return replace(self._execution.held, directive=Directive.SKIP, regime="non-finite")

    def _execute(self, action: Action) -> None:
        assert self._measurement is not None
        if action.directive is Directive.ROLLBACK:
            self._last_good.restore()
            self._measurement.forget()
            self._deliberation.rolled_back()
        if self._measurement is None:  # the controller has closed it
            return
        bad, self._measurement.bad = self._measurement.bad, None
        arm = bad is not None and self.mode != "shadow" and self._enforcer.may_skip()
        if self.step % self.context.decide_every == 0:  # what the next decision's telemetry will speak of
            self._armed = arm
        if bad is not None and arm:
            self._execution.arm(bad, action)
        if (self.step + 1) % self.context.decide_every == 0 and action.directive is Directive.PROCEED:
            self._measurement.before_step()  # first: a step that is handed over moves the weights
        self._previous_rate = rate_on_host(self._leading())  # before the scale is on it
        self._execution.execute(action)
        self._measurement.executed(action)

    def _let_go(self) -> None:
        """Executes the neutral action, within the slew limit; where even that fails, nothing."""
        if self._measurement is None:  # closed meanwhile: nobody would put the scale back
            self._execution.rest()
            return
        self._execution.put_back()
        self._measurement.rate_meter.forget()
        shadow = self.mode == "shadow"
        self._execution.let_go(NEUTRAL if shadow else self._enforcer.let_go(self.executed.lr_scale))

    # --- what it sees, and who agrees --------------------------------------------------------------------

    def _take(self) -> Measured:
        if self._measurement is None:
            return Measured(Telemetry())
        total = self.context.total_steps
        leading = self._leading()
        momentum = scheduled_momentum(leading)
        known = {
            "step": float(self.step),
            "progress": min(1.0, self.step / total) if total else NAN,
            "learning_rate": rate_on_host(leading),  # else the probe brings it along
            "previous_learning_rate": self._previous_rate,
            "momentum": NAN if momentum is None else momentum,
            "lr_scale": self.executed.lr_scale,
            "momentum_scale": self.executed.momentum_scale,
        }
        return self._measurement.take(known, self._vote(), self.step)

    def _vote(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        wish = self._switch.take() if self._switch is not None else None
        self._wished_by = wish[1] if wish is not None else "another rank"
        return votes.cast(wish[0] if wish else None, self._recorder.digest, self._last_good.step is not None)

    def _settle(self, ranks: np.ndarray[Any, np.dtype[np.float32]]) -> bool:
        """Does what the ranks agree on; whether a rollback is among what may be ruled."""
        wish, alike, restorable = votes.count(ranks)
        if wish is not None:
            self._change_mode(wish, self._wished_by)
        if not alike and not self._enforcer.suspended:
            self._enforcer.suspend()
            self._fault("ranks", RuntimeError("the ranks' last decisions differ; the controller is suspended on all"))
        return self.mode == "shadow" or restorable  # shadow mode records what would have been done

    def _change_mode(self, mode: Mode, by: str) -> None:
        before, scale = self.mode, self.executed.lr_scale
        if mode == before:
            return
        if not governs(mode):
            self._claim.release()
        elif not self._claim.take():
            log.warning("mode %s asked for by %s at step %d: another governor governs", mode, by, self.step)
            return
        self._enforcer.set_mode(mode)
        self._recorder.event("mode", self.step, {"from": before, "to": mode, "by": by})
        log.warning("governance at step %d: mode %s -> %s (%s); lr_scale was %.4g", self.step, before, mode, by, scale)
        if mode in ("off", "shadow", "skip"):
            self._execution.rest()
        if mode == "off":
            self._detach()

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
        return {
            **{key: self._recorder.counts[key] for key in _COUNTED},
            "suspended": self._enforcer.suspended,
            "faults": dict(self._recorder.faults),
            "overhead_seconds": self._overhead,
            "regimes": dict(self._recorder.regimes),
            "mode": self.mode,
            "controller": self._deliberation.summary(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next decision depends on: JSON data and tensors."""
        return {
            "step": self.step,
            "mode": self.mode,
            "rank": self._rank,
            "governed_by": self.controller.name,
            "controller": self.controller.state_dict(),
            "enforcer": self._enforcer.state_dict(),
            "sgd_rate": self._sgd_rate.state_dict(),
            "measurement": self._measurement.state_dict() if self._measurement is not None else None,
            "armed": self._armed,
            "leading_group": self._leading.index,
            "previous_rate": self._previous_rate,
            "held": brief(self._execution.held),
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

        Raises:
            ValueError: it is the state of another controller. Nothing has been restored then.
        """
        if (of := state.get("governed_by", self.controller.name)) != self.controller.name:
            raise ValueError(
                f"state: is of the controller {of!r}; accepted: of {self.controller.name!r}, which governs here, or none: it then starts anew"
            )
        own = state["rank"] == self._rank
        self.step = state["step"]
        self.controller.load_state_dict(state["controller"])
        self._enforcer.load_state_dict(state["enforcer"], state["mode"])
        self._sgd_rate.load_state_dict(state["sgd_rate"])
        if self._measurement is not None and state["measurement"] is not None:
            self._measurement.load_state_dict(state["measurement"], own=own)
        self._execution.executed = unbrief(state["executed"])
        # The state may come from a run with wider authority, or from one in another mode.
        held = self._enforcer.hold(unbrief(state["held"]), len(self.optimizer.param_groups))
        self._execution.held = held if self.mode in ("lr", "govern") else NEUTRAL
        self._ahead = None
        self._armed = state["armed"]
        self._leading.index, self._previous_rate = state.get("leading_group"), state.get("previous_rate", NAN)
        self._recorder.load_state_dict(state["recorder"], self.step)
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
        self._execution.put_back()
        if self._hooks is not None:
            self._hooks.remove()
            self._saving.remove()
        self._claim.release()
        if self._measurement is not None:
            self._measurement.close()
            self._measurement = None
        if self._switch is not None:
            self._switch.close()
            self._switch = None
        self._deliberation.close()
        self._recorder.close(self.step)

    def __enter__(self) -> Governor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
