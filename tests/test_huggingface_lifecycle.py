"""The callback in a real Hugging Face Trainer, on real (tiny) models: what it logs, how it comes and goes."""

import gc
import math
import os
import signal as signals
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")
pytest.importorskip("accelerate", reason="needs the extra lbw-rl[hf]")
pytest.importorskip("peft", reason="needs the extra lbw-rl[hf]")

from trainer_runs import (  # noqa: E402
    STEPS,
    WIDE,
    Seen,
    Text,
    decisions,
    logged,
    make_model,
    make_trainer,
    run_trainer,
    same,
    signal,
    weights,
)

from lbw_rl.integrations.huggingface import GovernorCallback  # noqa: E402

# --- what it logs ----------------------------------------------------------------------------------------


def test_tensorboard_gets_the_scales_and_the_signals(tmp_path, monkeypatch):
    """TensorBoard's callback is set up before ours; trackio's and W&B's are in the same place and get the same dict."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    callback = GovernorCallback("lbw-guard", authority=WIDE, ledger=tmp_path / "l.jsonl")
    trainer = run_trainer(tmp_path, callback, report_to="tensorboard", learning_rate=1.0)
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    made = decisions(tmp_path / "l.jsonl")
    read = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    def steps_of(values: list[float]) -> list[Any]:
        return [(i + 1, pytest.approx(v, rel=1e-6)) for i, v in enumerate(values) if v is not None]

    assert read["train/governor/lr_scale"] == steps_of([d["executed"]["lr_scale"] for d in made])
    assert read["train/governor/momentum_scale"] == steps_of([d["executed"]["momentum_scale"] for d in made])
    for name in ("loss", "grad_norm", "grad_entropy", "update_ratio", "surprise", "nonfinite", "host_memory"):
        assert read[f"train/governor/{name}"] == steps_of(signal(made, name)), name
        assert logged(trainer, f"governor/{name}") == [v for v in signal(made, name) if v is not None]
    assert logged(trainer, "governor/skips") == logged(trainer, "governor/rollbacks") == [0] * STEPS
    assert not any(math.isnan(v) for series in read.values() for _, v in series)
    assert logged(trainer, "learning_rate")[-1] < 1.0  # the schedule's, unscaled


def test_what_evaluate_and_train_return_stays_as_it_is(tmp_path):
    trainer = make_trainer(
        tmp_path, GovernorCallback(), Seen(), evaluated=Text(), eval_strategy="steps", eval_steps=2, max_steps=4
    )
    metrics = trainer.train().metrics
    assert not any("governor" in key for key in (*metrics, *trainer.evaluate()))
    with_values = [r for r in trainer.state.log_history if any("governor" in key for key in r)]
    assert [r["step"] for r in with_values] == [1, 2, 3, 4]


def test_the_order_of_all_other_callbacks_stays(tmp_path):
    seen, callback = Seen(), GovernorCallback()
    trainer = make_trainer(tmp_path, seen, callback)
    others = [c for c in trainer.callback_handler.callbacks if c is not callback]
    trainer.train()
    trainer.train()
    assert trainer.callback_handler.callbacks == [callback, *others]
    assert sum("governor/lr_scale" in record for record in seen.logs) == 2 * STEPS


def test_behind_a_callback_of_the_users_own_it_governs_and_keeps_its_place(tmp_path):
    class Forwarding(transformers.TrainerCallback):
        def __init__(self, inner: Any) -> None:
            for event in ("on_train_begin", "on_log", "on_train_end"):
                setattr(self, event, getattr(inner, event))

    early, callback = Seen(), GovernorCallback("lbw-guard", authority=WIDE)
    trainer = run_trainer(tmp_path, early, Forwarding(callback))
    assert callback.governor.summary()["decisions"] == STEPS
    assert not any("governor/lr_scale" in record for record in early.logs)
    assert len(logged(trainer, "governor/lr_scale")) == STEPS


# --- how it comes and goes -------------------------------------------------------------------------------


def hooks(trainer: Any) -> tuple[int, int, bool]:
    """Hooks on the optimizer and on the model, and whether torch's clipping is listened to."""
    optimizer = trainer.optimizer.optimizer
    tapped = hasattr(torch.nn.utils.clip_grad_norm_, "__wrapped__")
    return len(optimizer._optimizer_step_pre_hooks), len(trainer.model._forward_hooks), tapped


def test_training_twice_and_letting_go(tmp_path):
    untouched = torch.nn.utils.clip_grad_norm_
    callback = GovernorCallback("lbw-guard", authority=WIDE)
    trainer = run_trainer(tmp_path, callback)
    first = callback.governor
    assert hooks(trainer)[:2] == (0, 0)
    assert torch.nn.utils.clip_grad_norm_ is untouched
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.lr_scheduler.get_last_lr()[0]
    trainer.train()
    assert callback.governor is not first
    assert callback.governor.summary()["decisions"] == first.summary()["decisions"] == STEPS


class Fails(Text):
    """A data set whose tenth row cannot be read the first time."""

    failed = False

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 9 and not self.failed:
            self.failed = True
            raise OSError("the disk has gone")
        return super().__getitem__(index)


def test_a_training_that_raised_leaves_no_hooks_to_the_next(tmp_path):
    callback = GovernorCallback("lbw-guard", authority=WIDE, ledger=tmp_path / "l.jsonl")
    trainer = make_trainer(tmp_path, callback, data=Fails())
    with pytest.raises(OSError, match="the disk has gone"):
        trainer.train()
    first = callback.governor
    seen: list[Any] = []

    class Looks(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append(hooks(trainer))

    trainer.add_callback(Looks())
    trainer.train()
    assert seen == [(1, 1, True)] * STEPS
    assert 0 < first.step < STEPS
    assert callback.governor.summary()["decisions"] == STEPS
    assert hooks(trainer)[:2] == (0, 0)


def test_a_trainer_that_raised_and_is_given_up_leaves_its_model_without_hooks(tmp_path):
    trainer = make_trainer(tmp_path, GovernorCallback(), data=Fails())
    with pytest.raises(OSError, match="the disk has gone"):
        trainer.train()
    model = trainer.model
    assert model._forward_hooks
    del trainer
    gc.collect()
    assert not model._forward_hooks


def test_the_best_model_is_loaded_at_the_end_and_nothing_undoes_it(tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    callback = GovernorCallback("lbw-guard", authority=WIDE)
    trainer = run_trainer(
        tmp_path, callback, evaluated=Text(), load_best_model_at_end=True, learning_rate=1.0, **changes
    )
    best = type(trainer.model).from_pretrained(trainer.state.best_model_checkpoint)
    assert same([p.detach() for p in best.parameters()], weights(trainer))
    assert hooks(trainer)[:2] == (0, 0)


def test_the_switches_work_while_trainer_runs(tmp_path):
    signals.signal(signals.SIGUSR1, signals.SIG_DFL)

    class Operator(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                os.kill(os.getpid(), signals.SIGUSR1)

    (tmp_path / "control").write_text("shadow\n")
    callback = GovernorCallback(
        "random", ledger=tmp_path / "l.jsonl", control=tmp_path / "control", kill_signal=signals.SIGUSR1
    )
    trainer = run_trainer(tmp_path, callback, Operator())
    assert callback.governor.mode == "off"
    assert [d["step"] for d in decisions(tmp_path / "l.jsonl")] == [0, 1, 2]
    assert same(trainer, run_trainer(tmp_path))  # the control file had it in shadow from the start
    assert signals.getsignal(signals.SIGUSR1) is signals.SIG_IGN  # a second one must not end the run


def test_the_other_options_reach_the_governor(tmp_path):
    callback = GovernorCallback(
        authority={"max_rollbacks": 2}, decide_every=3, seed=11, snapshot_bytes=1, late=True, measure_device=False
    )
    run_trainer(tmp_path, callback)
    governor = callback.governor
    assert (governor.context.seed, governor.context.decide_every, governor.authority.max_rollbacks) == (11, 3, 2)
    assert governor.summary()["faults"] == {"snapshot": 1}  # one byte is not enough
    assert math.isnan(governor.last_telemetry.step_seconds)
    assert governor.last_telemetry.step == 0.0  # late: the second decision is about the first one's step
    default = GovernorCallback()
    run_trainer(tmp_path, default, max_steps=1)
    assert default.governor.context.seed == 3  # Trainer's own


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"controller: unknown name 'nobody'; accepted: constant, pid"):
        GovernorCallback("nobody")
    with pytest.raises(ValueError, match=r"mode: 'loud' is unknown; accepted: off, shadow"):
        GovernorCallback(mode="loud")
    with pytest.raises(ValueError, match=r"max_rollback"):
        GovernorCallback(authority={"max_rollback": 1})
    callback = GovernorCallback("constant")
    assert callback.governor is None

    class NoOptimizer:
        pass

    with pytest.raises(ValueError, match=r"optimizer: NoOptimizer cannot be governed; accepted: any torch"):
        callback.on_train_begin(None, None, None, optimizer=NoOptimizer())


def test_deepspeed_is_refused(tmp_path):
    from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper

    trainer = make_trainer(tmp_path)  # which sets Accelerate's state up
    wrapped = DeepSpeedOptimizerWrapper(torch.optim.AdamW(trainer.model.parameters()))
    with pytest.raises(ValueError, match=r"optimizer: DeepSpeedOptimizerWrapper cannot be governed"):
        GovernorCallback().on_train_begin(None, None, None, optimizer=wrapped, model=trainer.model)


def test_fsdp1_is_refused(tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(make_model(), device_id=torch.device("cpu"))
        optimizer = torch.optim.AdamW(model.parameters())
        with pytest.raises(ValueError, match=r"FullyShardedDataParallel cannot be governed; accepted: plain, DDP"):
            GovernorCallback().on_train_begin(None, None, None, optimizer=optimizer, model=model)
    finally:
        torch.distributed.destroy_process_group()
