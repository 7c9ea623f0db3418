"""The governor as a callback of Hugging Face's `Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lbw_rl.authority import Authority
from lbw_rl.controller import Controller
from lbw_rl.governor import Governor, Mode
from lbw_rl.registry import load_controller


class GovernorCallback(TrainerCallback):
    """`Trainer(..., callbacks=[GovernorCallback("lbw-guard")])`: governs the Trainer's own optimizer.

    It attaches to the optimizer's step hooks when training begins, so gradient accumulation, schedulers and
    Accelerate's wrapping keep working: one optimizer step is one step. The training loss of every micro-batch
    is read from the model's output. Trainer clips before the optimizer sees the gradients, so the gradient norm
    here is the clipped one. A resumed Trainer goes on at its step; the controller itself starts anew.

    The executed scales go into `log_history` and to callbacks that come after this one. Trackers that
    `report_to` sets up come before it: to send the scales to one, pass its callback after this one instead.

    Args:
        controller: a name, a `Controller`, or the folder of a frozen policy.
        authority, mode, ledger, decide_every: as in `Governor`.

    Raises:
        ValueError: an unknown controller.

    Attributes:
        governor: the attached `Governor`; None before training begins.
    """

    def __init__(
        self,
        controller: str | Path | Controller = "lbw-guard",
        *,
        authority: Authority | None = None,
        mode: Mode = "govern",
        ledger: str | Path | None = None,
        decide_every: int = 1,
    ) -> None:
        self.controller = load_controller(controller)
        self._options: dict[str, Any] = {
            "authority": authority,
            "mode": mode,
            "ledger": ledger,
            "decide_every": decide_every,
        }
        self.governor: Governor | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attaches to the optimizer that Trainer built."""
        if self.governor is not None:
            self.governor.close()
        optimizer = kwargs["optimizer"]
        inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps the optimizer, whose hooks we need
        if not isinstance(inner, torch.optim.Optimizer):
            raise ValueError(f"optimizer: {type(inner).__name__} is no torch.optim.Optimizer; it cannot be governed")
        self.governor = Governor(
            inner,
            self.controller,
            model=kwargs.get("model"),
            total_steps=state.max_steps or None,
            seed=args.seed,
            **self._options,
        )
        self.governor.step = state.global_step  # of a resumed training: its horizon goes on, not anew

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds the scales that were executed last to what Trainer logs."""
        if self.governor is None:
            return
        scales = {
            "governor/lr_scale": self.governor.executed.lr_scale,
            "governor/momentum_scale": self.governor.executed.momentum_scale,
        }
        for record in (kwargs.get("logs"), *state.log_history[-1:]):  # Trainer files a copy before it calls us
            if isinstance(record, dict):
                record.update(scales)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lets go of the optimizer; `governor.summary()` stays readable."""
        if self.governor is not None:
            self.governor.close()
