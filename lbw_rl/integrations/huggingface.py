"""The governor as a callback of Hugging Face's `Trainer`."""

from __future__ import annotations

import functools
import logging
import math
import pickle
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState

from lbw_rl.authority import Authority
from lbw_rl.controller import Controller
from lbw_rl.governor import Governor, Mode, _for_rank
from lbw_rl.json_state import from_json, to_json
from lbw_rl.ledger import truncate_ledger
from lbw_rl.registry import CONTROLLERS, load_controller
from lbw_rl.sample import is_sharded
from lbw_rl.stages import check_mode

log = logging.getLogger("lbw_rl")

_EXECUTED = frozenset({"step", "lr_scale", "momentum_scale"})  # of the step before: what is logged is the latest one's


class GovernorCallback(TrainerCallback, ExportableState):
    """`Trainer(..., callbacks=[GovernorCallback("lbw-guard")])`: governs the Trainer's own optimizer.

    It attaches to the optimizer's step hooks when training begins: one optimizer step is one step, whatever the
    accumulation. The loss of every micro-batch is read from the model's output, before Trainer filters NaN from its
    log, and the gradient norm from the clipping itself, before it clips. Skips and rollbacks withhold the gradients of
    the step at hand; a rollback rewinds Trainer's scheduler and scaler with the weights, so that a schedule ends that
    much short of its end, while `global_step` and the data go on.

    What Trainer logs with a training loss gains `governor/lr_scale`, `governor/momentum_scale`, `governor/skips`,
    `governor/rollbacks` and every signal that was measured, for all that it reports to (TensorBoard, trackio, W&B) and
    in `log_history`. Reporters come before users' callbacks, so this one moves to the front of Trainer's list when
    training begins; called by anything but Trainer's own handler it stays where it is, and what comes before it does
    not see its values.

    Checkpoints hold the governor's state, in `trainer_state.json`. A resumed Trainer decides as the uninterrupted one,
    and a ledger loses the steps that are taken again. The last good state is too large for that file: after a resume
    the first healthy decision keeps a new one. With several ranks the state is rank 0's; where measurements lag the
    decision (`late`) or weights are sharded, the first decision after a resume misses what only other ranks knew. A
    checkpoint of another controller, or of an ungoverned run, starts the controller anew.

    What does not work: with label smoothing, `compute_loss_func` or a `compute_loss` of your own that does not pass the
    labels to the model, the model's output has no loss: `loss` is then missing, so that no rule that needs it speaks,
    and a NaN is noticed by its gradient. DeepSpeed and FSDP1 keep the gradients to themselves and are refused; FSDP2
    and DDP work. One such callback per Trainer, one ledger per run. An exception in training leaves the governor
    attached until the next `train()`, or until this callback is gone.

    Args:
        controller: a name, a `Controller`, or the folder of a frozen policy.
        authority: an `Authority`, or its fields.
        seed: None takes `args.seed`.
        mode, ledger, decide_every, control, kill_signal, snapshot_bytes, measure_device, late, collective_timeout: as
            in `Governor`.

    Raises:
        ValueError: an unknown controller, mode or field of the authority; when training begins, what `Governor`
            refuses, DeepSpeed and FSDP1; when a Trainer is made with `restore_callback_states_from_checkpoint`, which
            builds callbacks anew, a controller object with options of its own.

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
    ) -> None:
        self.controller = load_controller(controller)
        self._name = _rebuildable_name(controller)
        self._options: dict[str, Any] = {
            "authority": authority if isinstance(authority, Authority) else Authority(**(authority or {})),
            "mode": check_mode(mode),
            "ledger": ledger,
            "decide_every": decide_every,
            "seed": seed,
            "control": control,
            "kill_signal": kill_signal,
            "snapshot_bytes": snapshot_bytes,
            "measure_device": measure_device,
            "late": late,
            "collective_timeout": collective_timeout,
        }
        self.governor: Governor | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuses what could not be restored later."""
        if getattr(args, "restore_callback_states_from_checkpoint", False) and self._name is None:
            raise ValueError(
                "controller: restore_callback_states_from_checkpoint builds callbacks from JSON and cannot build this "
                f"{type(self.controller).__name__}; accepted: a name or a folder, or leave that setting off, since the "
                "governor's state is restored without it"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attaches to the optimizer that Trainer built, and goes on from a checkpoint's state."""
        self._close()  # a training that raised never came to its end
        wrapped = kwargs["optimizer"]
        optimizer, model = _inner_optimizer(wrapped), kwargs.get("model")
        _refuse_unsupported(optimizer, model)
        handler, trainer = _caller(self)
        if handler is not None:  # a new list: the one that is being iterated over stays as it is
            handler.callbacks = [self, *(other for other in handler.callbacks if other is not self)]
        compiled = getattr(trainer, "model_wrapped", None)
        parts = {"scheduler": kwargs.get("lr_scheduler"), "scaler": getattr(wrapped, "scaler", None)}
        seed = self._options["seed"]
        build = functools.partial(
            Governor,
            optimizer,
            self.controller,
            model=compiled if hasattr(compiled, "_orig_mod") else model,  # hooks within a compiled graph would break it
            total_steps=state.max_steps or None,
            stateful={name: part for name, part in parts.items() if part is not None},
            device_index=args.device.index if args.device.type == "cuda" else None,
            **self._options | {"seed": args.seed if seed is None else seed},
        )
        saved = self._state_for(args, state, optimizer)
        ledger, mode = self._options["ledger"], self._options["mode"]
        if state.global_step and ledger is not None and mode != "off":
            try:
                truncate_ledger(_for_rank(ledger, args.process_index), saved["step"] if saved else state.global_step)
            except OSError as e:  # fail-open, as every fault of a ledger
                log.warning("ledger %s: what comes after the checkpoint could not be dropped: %s", ledger, e)
        self.governor = build()
        if saved is not None:
            try:
                self.governor.load_state_dict(saved)
            except Exception as e:  # fail-open: the run resumes, its controller does not
                log.warning("the governor starts anew, its state could not be restored: %s: %s", type(e).__name__, e)
                self.governor.close()
                self.governor, saved = build(), None
        if saved is None:
            self.governor.step = state.global_step  # of a resumed training: its horizon goes on, not anew
        self._release = weakref.finalize(self, self.governor.close)  # hooks must not outlive an abandoned Trainer
        self._release.atexit = False
        # Trainer saves states by name only where there was one before: not so in the checkpoint of an ungoverned run.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds what was measured and executed last to what Trainer logs of training."""
        logs = kwargs.get("logs")
        if self.governor is None or self._options["mode"] == "off" or not isinstance(logs, dict) or "loss" not in logs:
            return  # what evaluate() and train() return passes through here too, and is not ours to add to
        governor, summary = self.governor, self.governor.summary()
        values = {
            **{k: v for k, v in governor.last_telemetry.as_dict().items() if k not in _EXECUTED and math.isfinite(v)},
            "lr_scale": governor.executed.lr_scale,
            "momentum_scale": governor.executed.momentum_scale,
            "skips": summary["skips"],
            "rollbacks": summary["rollbacks"],
        }
        records = [r for r in state.log_history[-1:] if "loss" in r]  # Trainer files a copy before it calls us
        for record in (logs, *records):
            record.update({f"governor/{name}": value for name, value in values.items()})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
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

    def _state_for(
        self, args: TrainingArguments, state: TrainerState, optimizer: torch.optim.Optimizer
    ) -> dict[str, Any] | None:
        """The governor's state in the checkpoint that training resumes from, as this rank has to load it."""
        record = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if not isinstance(record, dict) or record.get("governor") is None:
            return None
        if record["controller"] != self.controller.name:
            log.warning("the checkpoint is %s's; %s starts anew", record["controller"], self.controller.name)
            return None
        saved: dict[str, Any] = from_json(record["governor"])
        measured = saved["measurement"]
        if args.world_size > 1 and measured is not None:
            # Rank 0 saved it. Ranks add up what each answers for: the same part must not be counted on every one.
            measured["pending"] = None
            sharded = any(is_sharded(p) for group in optimizer.param_groups for p in group["params"])
            for name in ("before", "after"):
                part = measured["probe"][name]
                if part is not None and (sharded or args.process_index):
                    measured["probe"][name] = None if sharded else torch.zeros_like(part)
        return saved

    def _close(self) -> None:
        if self.governor is not None:
            self.governor.close()


def _rebuildable_name(controller: str | Path | Controller) -> str | None:
    """The text from which `load_controller` makes an equal controller, if there is one."""
    if not isinstance(controller, Controller):
        return str(controller)
    try:
        same = controller.name in CONTROLLERS and pickle.dumps(controller) == pickle.dumps(
            load_controller(controller.name)
        )
    except Exception:  # a controller of the user's own need not know pickle
        return None
    return controller.name if same else None


def _inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer whose hooks run, inside Accelerate's wrapper."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer: {type(optimizer).__name__} is no torch.optim.Optimizer; it cannot be governed")
    return optimizer


def _refuse_unsupported(optimizer: torch.optim.Optimizer, model: torch.nn.Module | None) -> None:
    for module in model.modules() if model is not None else ():
        if type(module).__module__.startswith("deepspeed") or type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(f"model: {type(module).__name__} cannot be governed; accepted: plain, DDP or FSDP2 models")


def _caller(callback: TrainerCallback) -> tuple[CallbackHandler | None, Any]:
    """The handler that calls `callback`, and its Trainer: neither is among what callbacks are told."""
    handler = None
    frame: FrameType | None = sys._getframe(1)
    for _ in range(32):
        if frame is None:
            break
        owner = frame.f_locals.get("self")
        if handler is None and isinstance(owner, CallbackHandler):
            handler = owner if any(other is callback for other in owner.callbacks) else None
        elif handler is not None and getattr(owner, "callback_handler", None) is handler:
            return handler, owner
        frame = frame.f_back
    return handler, None
