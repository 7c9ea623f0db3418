"""The governor as a callback of Hugging Face's `Trainer`."""

from __future__ import annotations

import functools
import json
import logging
import math
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState

from lbw_rl.authority import Authority
from lbw_rl.controller import Controller
from lbw_rl.governor import Governor, Mode
from lbw_rl.json_state import from_json, to_json
from lbw_rl.ledger import ledger_of_rank, truncate_jsonl
from lbw_rl.registry import load_controller
from lbw_rl.sinks import Sink
from lbw_rl.stages import check_mode

log = logging.getLogger("lbw_rl")

_ANEW = "the governor starts anew, its state could not be restored: %s: %s"
_EXECUTED = frozenset({"step", "lr_scale", "momentum_scale"})  # of the step before: what is logged is the latest one's


class GovernorCallback(TrainerCallback, ExportableState):
    """`Trainer(..., callbacks=[GovernorCallback("lbw-guard")])`: governs the Trainer's own optimizer.

    It attaches to the optimizer's step hooks when training begins: one optimizer step is one step, whatever the
    accumulation. Losses are read from the model's output, micro-batch by micro-batch, before Trainer filters NaN from
    its log; the gradient norm is that of before clipping. Skips and rollbacks withhold the gradients of the step at
    hand. A rollback rewinds Trainer's scheduler and scaler with the weights: `global_step` and the data go on, and the
    schedule ends that much short of its end.

    Every log of a training loss gains `governor/lr_scale`, `governor/momentum_scale`, `governor/skips`,
    `governor/rollbacks` and the signals that were measured, for all that Trainer reports to (TensorBoard, trackio, W&B)
    and in `log_history`. Reporters come before users' callbacks, so this one moves to the front of Trainer's list when
    training begins; called by anything but Trainer's own handler it stays where it is, unseen by what comes before it.

    Checkpoints hold the governor's state, in `trainer_state.json`: a resumed Trainer decides as the uninterrupted one,
    and the ledger loses the steps that are taken again. The last good state is too large for that file; after a resume
    the first healthy decision keeps a new one. With several ranks the state is rank 0's: where measurements lag the
    decision (`late`) or weights are sharded, the first decision misses what only the other ranks knew. A checkpoint
    of another controller, or of an ungoverned run, starts the controller anew.

    What does not work: with label smoothing, `compute_loss_func`, or a `compute_loss` that keeps the labels from the
    model, the output has no loss. It is then missing: no rule that needs it speaks, and a NaN shows in the gradient
    only. DeepSpeed and FSDP1 are refused; DDP and FSDP2 work. One such callback per Trainer, one ledger per run. An
    exception in training leaves the governor attached until the next `train()`, or until this callback is gone.

    Args:
        controller: a name, a `Controller`, or the folder of a frozen policy.
        authority: an `Authority`, or its fields.
        seed: None takes `args.seed`.
        mode, ledger, decide_every, control, kill_signal, snapshot_bytes, measure_device, late, collective_timeout, sinks:
            as in `Governor`.

    Raises:
        ValueError: an unknown controller, mode or field of the authority; when training begins, what `Governor`
            refuses, DeepSpeed and FSDP1; when a Trainer is made with `restore_callback_states_from_checkpoint`, which
            builds callbacks anew, sinks or a controller object with options of its own.

    Attributes:
        governor: the attached `Governor`; None before training begins.
    """

    def __init__(
        self,
        controller: str | Path | Controller = "lbw-guard",
        *,
        authority: Authority | Mapping[str, Any] | None = None,
        mode: Mode = "govern",
        ledger: str | Path | None = None,
        decide_every: int = 1,
        seed: int | None = None,
        control: str | Path | None = None,
        kill_signal: int | None = None,
        snapshot_bytes: int = 2 << 30,
        measure_device: bool = True,
        late: bool | None = None,
        collective_timeout: float = 600.0,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self.controller = load_controller(controller)
        self._name = _rebuildable_name(controller)
        rights = Authority.of(authority)
        self._options: dict[str, Any] = {"authority": rights, "mode": check_mode(mode), "ledger": ledger, "seed": seed}
        self._options |= {"decide_every": decide_every, "control": control, "kill_signal": kill_signal, "late": late}
        self._options |= {"snapshot_bytes": snapshot_bytes, "measure_device": measure_device}
        self._options["collective_timeout"] = collective_timeout
        self._sinks = tuple(sinks)
        self.governor: Governor | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuses what could not be restored later."""
        if not getattr(args, "restore_callback_states_from_checkpoint", False):
            return
        builds = "restore_callback_states_from_checkpoint builds callbacks from JSON and cannot build"
        if self._name is None:
            raise ValueError(
                f"controller: {builds} this {type(self.controller).__name__}; accepted: a name or a folder, or that "
                "setting off"
            )
        if self._sinks:
            names = ", ".join(sink.name for sink in self._sinks)
            raise ValueError(f"sinks: {builds} {names}; accepted: no sinks, or that setting off")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attaches to the optimizer that Trainer built, and goes on from a checkpoint's state."""
        self._close()  # a training that raised never came to its end
        optimizer, model = _unwrapped(kwargs["optimizer"], kwargs.get("model"))
        handler = _calling_handler(self)
        if handler is not None:  # a new list: the one that is being iterated over stays as it is
            handler.callbacks = [self, *(other for other in handler.callbacks if other is not self)]
        stateful = {"scheduler": kwargs.get("lr_scheduler"), "scaler": getattr(kwargs["optimizer"], "scaler", None)}
        build = functools.partial(
            Governor,
            optimizer,
            self.controller,
            model=model,
            total_steps=state.max_steps or None,
            stateful={name: part for name, part in stateful.items() if part is not None},
            device_index=args.device.index if args.device.type == "cuda" else None,
            sinks=self._sinks,
            **self._options | {"seed": args.seed if self._options["seed"] is None else self._options["seed"]},
        )
        states: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
        saved = self._saved(states) if state.global_step else None
        ledger = ledger_of_rank(self._options["ledger"], args.process_index)
        if state.global_step and ledger is not None and self._options["mode"] != "off":
            try:
                truncate_jsonl(ledger, saved["step"] if saved and saved["mode"] != "off" else state.global_step)
            except OSError as e:  # fail-open, as every fault of a ledger
                log.warning("ledger %s: what comes after the checkpoint could not be dropped: %s", ledger, e)
        governor = build()
        if saved is not None:
            try:
                governor.load_state_dict(saved)
            except Exception as e:  # fail-open: the run resumes, its controller does not
                log.warning(_ANEW, type(e).__name__, e)
                governor.close()
                governor, saved = build(), None
        if saved is None:
            governor.step = state.global_step  # of a resumed training: its horizon goes on, not anew
        self.governor = governor
        self._abandoned = weakref.finalize(self, governor.close)  # hooks must not outlive a Trainer given up
        # Trainer saves states by name only where there was one before: not so in the checkpoint of an ungoverned run.
        states.setdefault(type(self).__name__, self.state())

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds what was measured and executed last to what Trainer logs of training."""
        logs: dict[str, Any] = kwargs.get("logs") or {}
        if self.governor is None or self._options["mode"] == "off" or "loss" not in logs:
            return  # what evaluate() and train() return passes through here too, and is not ours to add to
        seen, executed, summary = self.governor.last_telemetry, self.governor.executed, self.governor.summary()
        values = {k: v for k, v in seen.as_dict().items() if k not in _EXECUTED and math.isfinite(v)}
        values |= {"lr_scale": executed.lr_scale, "momentum_scale": executed.momentum_scale}
        values |= {"skips": summary["skips"], "rollbacks": summary["rollbacks"]}
        records = [r for r in state.log_history[-1:] if "loss" in r]  # Trainer files a copy before it calls us
        for record in (logs, *records):
            record.update({f"governor/{name}": value for name, value in values.items()})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Lets go of the optimizer; `governor.summary()` stays readable."""
        self._close()

    def state(self) -> dict[str, Any]:
        """What Trainer saves: arguments that build this callback again, and the governor's state without its snapshot."""
        authority, paths = self._options["authority"].model_dump(mode="json"), ("ledger", "control")
        texts = {k: None if self._options[k] is None else str(self._options[k]) for k in paths}
        arguments = {"controller": self._name, **self._options, "authority": authority, **texts}
        saved = None
        if self.governor is not None:
            arguments["mode"] = self.governor.mode
            try:
                self.governor.flush()
                saved = to_json({**self.governor.state_dict(), "snapshot": None})
            except Exception as e:  # fail-open: the checkpoint is the run's before it is ours
                log.warning("the checkpoint has no governor's state: %s: %s", type(e).__name__, e)
        return {"args": arguments, "attributes": {}, "controller": self.controller.name, "governor": saved}

    def _saved(self, states: Mapping[str, Any]) -> dict[str, Any] | None:
        """The governor's state in the checkpoint that training resumes from."""
        record = states.get(type(self).__name__)
        if isinstance(record, list):
            log.warning("the checkpoint is of %d governor callbacks, whose states cannot be told apart", len(record))
        if not isinstance(record, dict) or record.get("governor") is None:
            return None
        if record["controller"] != self.controller.name:
            log.warning("the checkpoint is %s's; %s starts anew", record["controller"], self.controller.name)
            return None
        try:
            saved: dict[str, Any] = from_json(record["governor"])
        except (ValueError, KeyError, TypeError) as e:  # fail-open, as for a state that does not fit
            log.warning(_ANEW, type(e).__name__, e)
            return None
        return saved

    def _close(self) -> None:
        if self.governor is not None:
            self.governor.close()
            self._abandoned.detach()


def _rebuildable_name(controller: str | Path | Controller) -> str | None:
    """The text from which `load_controller` makes an equal controller, if there is one."""
    if not isinstance(controller, Controller):
        return str(controller)
    try:
        named = load_controller(controller.name)
        return controller.name if type(named) is type(controller) and _fields(named) == _fields(controller) else None
    except Exception:  # a controller of the user's own has no such name, and may hold anything
        return None


def _fields(thing: object) -> str:
    return json.dumps(vars(thing), default=vars, sort_keys=True)


def _unwrapped(optimizer: Any, model: Any) -> tuple[torch.optim.Optimizer, torch.nn.Module | None]:
    """The optimizer whose hooks run, inside Accelerate's wrapper, and the model, if they can be governed."""
    inner = optimizer
    while isinstance(inner, AcceleratedOptimizer) and not isinstance(inner, DeepSpeedOptimizerWrapper):
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer) or isinstance(inner, DeepSpeedOptimizerWrapper):
        raise ValueError(f"optimizer: {type(inner).__name__} cannot be governed; accepted: any torch.optim.Optimizer")
    if model is not None and any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ValueError("model: FullyShardedDataParallel cannot be governed; accepted: plain, DDP and FSDP2 models")
    return inner, model


def _calling_handler(callback: TrainerCallback) -> CallbackHandler | None:
    """The handler that is calling `callback`: callbacks are not told of it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, CallbackHandler):
            return owner if any(other is callback for other in owner.callbacks) else None
        frame = frame.f_back
    return None
