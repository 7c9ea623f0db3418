"""The governor as a callback of Lightning's `Trainer`."""

from __future__ import annotations

import functools
import importlib
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from lbw_rl.authority import Authority
from lbw_rl.controller import Controller
from lbw_rl.governor import Governor
from lbw_rl.ledger import ledger_of_rank, truncate_jsonl
from lbw_rl.registry import load_controller
from lbw_rl.sinks import Sink
from lbw_rl.snapshot import Stateful
from lbw_rl.stages import Mode, check_mode


def _import_lightning() -> ModuleType:
    """Lightning 2, under the name that the program uses: each of the two refuses the other's callbacks.

    Raises:
        ModuleNotFoundError: it is installed under neither.
    """
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in sorted(names, key=lambda name: name not in sys.modules):  # the one that is in use, else the newer one
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as e:
            if e.name not in (name, name.partition(".")[0]):
                raise  # it is there, and lacks something itself
    needs = "lbw_rl.integrations.lightning needs Lightning 2; accepted: pip install lightning"
    raise ModuleNotFoundError(needs, name="lightning")


if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = _import_lightning().Callback

log = logging.getLogger("lbw_rl")


class GovernorCallback(Callback):
    """`Trainer(callbacks=[GovernorCallback("lbw-guard")])`: governs the optimizer of `configure_optimizers`.

    It attaches when training begins. One optimizer step is one step, in automatic and in manual optimization and under
    `accumulate_grad_batches`. The loss is the one that is back-propagated (in manual optimization by
    `manual_backward`), one for each call, before Lightning divides or scales it; the gradient norm is the one before
    `gradient_clip_val`. Validation, the sanity check included, goes unseen. Lightning's scheduler and gradient scaler go
    back with a rollback, while `global_step` and the data go on.

    Lightning's checkpoints hold the governor, its last good state included. A training that is resumed with `ckpt_path`
    decides as the uninterrupted one, and a ledger loses the steps that are taken again. The checkpoint of an ungoverned
    training, or of another controller, starts the controller anew at the step that is reached. With several ranks the
    state is rank 0's; where measurements lag the decision (`late`) or weights are sharded, the first decision after a
    resume misses what only other ranks knew.

    The signals, the executed scales and the counts of skips and rollbacks go to the Trainer's loggers as `governor/…`,
    every `log_every_n_steps`; the progress bar and `callback_metrics` stay the user's own.

    Args:
        controller: a name, a `Controller`, or the folder of a frozen policy.
        total_steps: as in `Governor`; None: what the Trainer estimates, where it can.
        stateful: name → what a rollback puts back besides weights, buffers, optimizer, scheduler and scaler.
        device_index: which GPU NVML reads; None: the one that Lightning trains on.
        authority, mode, ledger, decide_every, seed, snapshot_bytes, control, kill_signal, measure_device, late,
        process_group, collective_timeout, sinks: as in `Governor`.

    Raises:
        ValueError: an unknown controller or mode; from `Trainer.fit`: several optimizers, or one that is no
            `torch.optim.Optimizer`, or an option that `Governor` refuses.

    Attributes:
        governor: the attached `Governor`; None before training begins. After it, `governor.summary()` stays readable.
    """

    def __init__(
        self,
        controller: str | Path | Controller = "lbw-guard",
        *,
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
        super().__init__()
        self.controller = load_controller(controller)
        self._total_steps, self._stateful, self._device_index = total_steps, dict(stateful or {}), device_index
        self._options: dict[str, Any] = {
            "authority": Authority.of(authority),
            "mode": check_mode(mode),
            "ledger": ledger,
            "decide_every": decide_every,
            "seed": seed,
            "snapshot_bytes": snapshot_bytes,
            "control": control,
            "kill_signal": kill_signal,
            "measure_device": measure_device,
            "late": late,
            "process_group": process_group,
            "collective_timeout": collective_timeout,
            "sinks": tuple(sinks),
        }
        self.governor: Governor | None = None
        self._attached = False
        self._scaler: Any = None
        self._step = 0  # after the last batch
        self._loaded: dict[str, Any] | None = None  # from a checkpoint, until the optimizer has been restored
        self._final: dict[str, Any] = {}  # what a checkpoint after the training holds

    @property
    def state_key(self) -> str:
        """A checkpoint is resumed by the same controller; another one starts anew, at the step that is reached."""
        return self._generate_state_key(controller=self.controller.name)

    # --- attaching and letting go --------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets a state that an earlier `validate` or `test` has read from its checkpoint."""
        self._loaded = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches to the optimizer, whose own state Lightning has restored by now, and goes on from a checkpoint."""
        self._let_go()
        optimizers: list[Any] = trainer.optimizers
        if len(optimizers) != 1:
            raise ValueError(f"optimizers: configure_optimizers made {len(optimizers)}; accepted: 1")
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        parts = {"scheduler" if i == 0 else f"scheduler {i}": s for i, s in enumerate(schedulers)}
        device = trainer.strategy.root_device
        build = functools.partial(
            Governor,
            optimizers[0],
            self.controller,
            model=pl_module,
            total_steps=self._total_steps or _planned_steps(trainer),
            stateful={**parts, **({"scaler": self._scaler} if self._scaler is not None else {}), **self._stateful},
            device_index=device.index if self._device_index is None and device.type == "cuda" else self._device_index,
            **self._options,
        )
        saved, self._loaded = self._loaded, None
        ledger = ledger_of_rank(self._options["ledger"], trainer.global_rank)
        if trainer.global_step and ledger is not None and self._options["mode"] != "off":
            try:  # what came after the checkpoint is done again
                truncate_jsonl(ledger, saved["step"] if saved and saved["mode"] != "off" else trainer.global_step)
            except OSError as e:  # fail-open, as every fault of a ledger
                log.warning("ledger %s: what comes after the checkpoint could not be dropped: %s", ledger, e)
        self.governor = build()
        if saved:
            try:
                self.governor.load_state_dict(saved)
            except Exception as e:  # fail-open: the training resumes, its controller does not
                log.warning("the governor starts anew, its state could not be restored: %s: %s", type(e).__name__, e)
                self.governor.close()
                self.governor, saved = build(), None
        if not saved:
            self.governor.step = trainer.global_step  # of a training that began without us: its horizon goes on
        self._attached, self._step = True, self.governor.step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets go of the optimizer."""
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets go of the optimizer."""
        self._let_go()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the optimizer, if that has not happened yet."""
        self._let_go()

    def _let_go(self) -> None:
        if self.governor is None or not self._attached:
            return
        self._final = self.state_dict()  # Lightning may write one more checkpoint
        self._attached = False
        self.governor.close()

    # --- what it sees ----------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Counts the batch's tokens, if it holds any."""
        if self.governor is not None:
            self.governor.observe(tokens=_tokens(batch))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Takes in the loss, as it was before Lightning scaled it and divided it by the batches it accumulates."""
        if self.governor is None:
            return
        loss = loss.detach()
        if self._scaler is not None and self._scaler.is_enabled():
            loss = loss / self._scaler._scale  # its `get_scale` would wait for the device
        if pl_module.automatic_optimization and trainer.accumulate_grad_batches > 1:
            loss = loss * trainer.accumulate_grad_batches
        self.governor.observe(loss)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs, when it is due and this batch brought an optimizer step."""
        governor = self.governor
        if governor is None or governor.step == self._step:
            return
        self._step = governor.step
        axis = _logging_step(trainer)
        if axis is None or governor.mode == "off" or not trainer.loggers:
            return
        summary = governor.summary()
        values = {
            **governor.last_telemetry.as_dict(),
            "lr_scale": governor.executed.lr_scale,
            "momentum_scale": governor.executed.momentum_scale,
            "skips": summary["skips"],
            "rollbacks": summary["rollbacks"],
        }
        del values["step"]  # the loggers have their own
        metrics = {f"governor/{name}": float(value) for name, value in values.items() if math.isfinite(value)}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=axis)

    # --- checkpoints -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The governor's state, for Lightning's checkpoint."""
        if self.governor is None or not self._attached:
            return self._loaded or self._final
        try:
            self.governor.flush()
            return self.governor.state_dict()
        except Exception as e:  # fail-open: the checkpoint is the training's before it is ours
            log.warning("the checkpoint has no governor's state: %s: %s", type(e).__name__, e)
            return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until training starts: Lightning calls this before there is an optimizer."""
        self._loaded = state_dict


def _logging_step(trainer: Any) -> int | None:
    """Where on the axis of Lightning's own logging this batch is; None where it does not log."""
    step: int = trainer.fit_loop.epoch_loop._batches_that_stepped  # as in `LearningRateMonitor`; nothing public says it
    every: int = trainer.log_every_n_steps
    return step if every and (step + 1) % every == 0 else None


def _planned_steps(trainer: Trainer) -> int | None:
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 < steps < math.inf else None  # a stream of unknown length reads as -1 or infinite


def _tokens(batch: Any) -> int | None:
    """How many token ids a batch holds: its `input_ids`, or a tensor of integers that comes first."""
    if isinstance(batch, Mapping):
        batch = batch.get("input_ids")
    elif isinstance(batch, list | tuple) and batch:
        batch = batch[0]
    if isinstance(batch, torch.Tensor) and batch.dtype in (torch.int32, torch.int64):
        return batch.numel()
    return None
