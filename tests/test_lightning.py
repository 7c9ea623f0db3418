"""The callback in a real Lightning Trainer, against training loops written by hand and against Lightning alone."""

import copy
import csv
import json
import math
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pl = pytest.importorskip("lightning.pytorch", reason="needs Lightning")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from lbw_rl import Action, Authority, Controller, Directive, Governor  # noqa: E402
from lbw_rl.action import NEUTRAL  # noqa: E402
from lbw_rl.integrations.lightning import GovernorCallback  # noqa: E402

WIDE = Authority(lr_scale=(1e-3, 100.0), momentum_scale=(0.5, 2.0))
BATCHES, EPOCHS, LR = 6, 2, 0.05


class Scripted(Controller):
    """Proposes what the test says, in order, then nothing; keeps what it saw."""

    name = "scripted"

    def __init__(self, *script: Action):
        self.script, self.seen = list(script), []

    def reset(self, context: Any) -> None:
        self.context = context

    def act(self, telemetry: Any) -> Action:
        self.seen.append(telemetry)
        return self.script[len(self.seen) - 1] if len(self.seen) <= len(self.script) else NEUTRAL


def rows(count: int = BATCHES, seed: int = 0) -> torch.utils.data.DataLoader:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(4 * count, 8, generator=generator), torch.randn(4 * count, 3, generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)


class Regression(pl.LightningModule):
    """A module as a user writes it, which keeps what the tests look at."""

    def __init__(self, network: torch.nn.Module, kind: type = torch.optim.AdamW, **settings: Any):
        super().__init__()
        self.network, self.kind, self.settings = network, kind, {"lr": LR} | settings
        self.losses, self.norms, self.history, self.rates = [], [], [], []
        self.poisoned: set[int] = set()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = loss_of(self.network, batch)
        self.losses.append(loss.item())
        return loss * math.nan if self.global_step in self.poisoned else loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", 1000 * loss_of(self.network, batch))

    def configure_optimizers(self) -> Any:
        optimizer = self.kind(self.parameters(), **self.settings)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine(optimizer), "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms.append(norm_of(self.network))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.history.append(bits(self.network, self.trainer.optimizers[0]))
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=BATCHES * EPOCHS)


def loss_of(network: torch.nn.Module, batch: Any) -> torch.Tensor:
    return torch.nn.functional.mse_loss(network(batch[0]), batch[1])


def norm_of(network: torch.nn.Module) -> float:
    return torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None]).item()


def bits(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    state = [optimizer.state.get(p, {}) for p in network.parameters()]
    return copy.deepcopy((list(network.state_dict().values()), [list(s.values()) for s in state]))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple | list):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def weights(module: Regression) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.network.parameters()]


def decisions(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Any]:
    def make(*callbacks: Any, **options: Any) -> Any:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        settings = {
            "accelerator": "cpu", "devices": 1, "max_epochs": EPOCHS, "default_root_dir": tmp_path,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        }  # fmt: skip
        return pl.Trainer(callbacks=list(callbacks), **(quiet | settings | options))

    return make


@pytest.fixture
def fit(make_trainer: Any, make_mlp: Any) -> Callable[..., Any]:
    """Trains the same network on the same data; the module, afterwards."""

    def go(*callbacks: Any, module: Any = None, resume: Any = None, val: Any = None, **options: Any) -> Any:
        module = module or Regression(make_mlp())
        trainer = make_trainer(*callbacks, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Lightning, on loaders without workers and the like
            trainer.fit(module, rows(), val, ckpt_path=resume)
        module.finished = trainer
        return module

    return go


# ---- idle: no bit moves


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}],
    ids=["plain", "accumulated-and-clipped", "bf16-mixed"],
)
def test_constant_and_shadow_and_off_leave_every_bit(options, fit, tmp_path):
    alone = fit(**options)
    for callback in (
        GovernorCallback("constant", authority=WIDE),
        GovernorCallback("random", authority=WIDE, mode="shadow", ledger=tmp_path / "shadow.jsonl"),
        GovernorCallback("random", authority=WIDE, mode="off"),
    ):
        governed = fit(callback, **options)
        assert same(weights(governed), weights(alone))
        assert governed.losses == alone.losses
        assert governed.rates == alone.rates
    steps = BATCHES * EPOCHS // options.get("accumulate_grad_batches", 1)
    assert len(decisions(tmp_path / "shadow.jsonl")) == steps


# ---- against a loop written by hand


def by_hand(network, ledger, kind, settings, accumulate, clip, controller, total_steps):
    """The same training without Lightning; loss and norm are told, not overheard."""
    optimizer = kind(network.parameters(), **settings)
    scheduler = cosine(optimizer)
    options = {"ledger": ledger, "total_steps": total_steps, "authority": WIDE, "measure_device": False}
    with Governor(optimizer, controller, **options) as governor:
        for _ in range(EPOCHS):
            for i, batch in enumerate(rows()):
                loss = loss_of(network, batch)
                (loss / accumulate).backward()
                governor.observe(loss)
                if (i + 1) % accumulate:
                    continue
                if clip:
                    governor.observe(grad_norm=torch.nn.utils.clip_grad_norm_(network.parameters(), clip))
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
    return [p.detach() for p in network.parameters()]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(torch.optim.AdamW, {"lr": 1.0, "fused": True}), (torch.optim.SGD, {"lr": 0.5, "momentum": 0.9})],
    ids=["adamw-fused", "sgd"],
)
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, 0.05)], ids=["each-batch", "accumulated-and-clipped"])
@pytest.mark.parametrize("controller", ["lbw-guard", "random"])
def test_it_decides_and_trains_as_a_loop_written_by_hand(
    controller, accumulate, clip, kind, settings, fit, make_mlp, tmp_path
):
    callback = GovernorCallback(controller, authority=WIDE, ledger=tmp_path / "lightning.jsonl", measure_device=False)
    governed = fit(
        callback,
        module=Regression(make_mlp(), kind, **settings),
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
    )
    steps = BATCHES * EPOCHS // accumulate
    expected = by_hand(make_mlp(), tmp_path / "hand.jsonl", kind, settings, accumulate, clip, controller, steps)
    assert (tmp_path / "lightning.jsonl").read_text() == (tmp_path / "hand.jsonl").read_text()
    assert same(weights(governed), expected)
    summary = callback.governor.summary()
    assert summary["decisions"] == steps
    assert summary["interventions"] > 0
    assert not summary["faults"]
    assert governed.finished.global_step == steps


class ByOneself(Regression):
    """Manual optimization: two micro-batches a step, clipped by the module itself."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        loss = loss_of(self.network, batch)
        self.losses.append(loss.item())
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()


def test_manual_optimization_is_governed_as_a_loop_written_by_hand(fit, make_mlp, tmp_path):
    callback = GovernorCallback("random", authority=WIDE, total_steps=6, ledger=tmp_path / "ledger.jsonl")
    governed = fit(callback, module=ByOneself(make_mlp()))
    kind, settings = torch.optim.AdamW, {"lr": LR}
    assert same(weights(governed), by_hand(make_mlp(), tmp_path / "hand", kind, settings, 2, 0.05, "random", 6))
    ours, theirs = decisions(tmp_path / "ledger.jsonl"), decisions(tmp_path / "hand")
    assert [d["executed"] for d in ours] == [d["executed"] for d in theirs]
    for name, factor in (("loss", 0.5), ("grad_norm", 1.0)):  # what is back-propagated is half of each loss here
        assert [d["telemetry"][name] for d in ours] == [factor * d["telemetry"][name] for d in theirs]


# ---- what it sees


def test_the_raw_loss_of_every_micro_batch_is_seen_and_no_evaluation(fit):
    controller = Scripted()
    governed = fit(
        GovernorCallback(controller), accumulate_grad_batches=3, val=rows(2, seed=1), num_sanity_val_steps=2,
        val_check_interval=2,
    )  # fmt: skip
    assert len(governed.losses) == BATCHES * EPOCHS
    means = [sum(governed.losses[i : i + 3]) / 3 for i in range(0, BATCHES * EPOCHS, 3)]
    assert [t.loss for t in controller.seen] == pytest.approx(means, rel=1e-6)
    assert governed.finished.callback_metrics["val_loss"] > 100 * max(means)  # an evaluation would show


def test_the_gradient_norm_is_the_one_before_clipping(fit):
    controller = Scripted()
    governed = fit(GovernorCallback(controller), gradient_clip_val=1e-3)
    assert [t.grad_norm for t in controller.seen] == pytest.approx(governed.norms, rel=1e-6)
    assert min(governed.norms) > 1e-2


def test_tokens_are_counted_where_a_batch_holds_them():
    from lbw_rl.integrations.lightning import _tokens

    ids = torch.zeros(2, 8, dtype=torch.int64)
    assert _tokens({"input_ids": ids}) == _tokens((ids, ids)) == _tokens(ids) == 16
    assert _tokens({"image": ids}) is _tokens([torch.zeros(3)]) is _tokens("text") is _tokens([]) is None


def test_the_horizon_is_the_trainer_s_where_it_knows_one(fit, make_trainer, make_mlp):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(rows().dataset)

    for options, expected in (
        ({}, BATCHES * EPOCHS),
        ({"max_steps": 5}, 5),
        ({"accumulate_grad_batches": 4}, 2 * EPOCHS),  # the last batches of an epoch step on their own
    ):
        controller = Scripted()
        fit(GovernorCallback(controller), **options)
        assert controller.context.total_steps == expected
    told, stream = Scripted(), Scripted()
    fit(GovernorCallback(told, total_steps=99))
    assert told.context.total_steps == 99
    endless = torch.utils.data.DataLoader(Stream(), batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_trainer(GovernorCallback(stream)).fit(Regression(make_mlp()), endless)
    assert stream.context.total_steps is None
    assert math.isnan(stream.seen[-1].progress)


# ---- 16-bit


def test_under_a_gradient_scaler_loss_and_norm_are_the_unscaled_ones(fit, make_mlp):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    controller = Scripted()
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    governed = fit(GovernorCallback(controller), plugins=[plugin], accumulate_grad_batches=2, gradient_clip_val=1e-2)
    means = [sum(governed.losses[i : i + 2]) / 2 for i in range(0, BATCHES * EPOCHS, 2)]
    assert [t.loss for t in controller.seen] == pytest.approx(means, rel=1e-6)
    assert [t.grad_norm for t in controller.seen] == pytest.approx(governed.norms, rel=1e-6)
    assert controller.seen[0].loss_scale == 1024
    assert controller.seen[-1].loss_scale > 1024


def test_an_idle_governor_moves_no_bit_under_a_gradient_scaler(fit):
    def train(*callbacks: Any) -> tuple[Any, dict[str, Any]]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=2)  # the first steps overflow
        return weights(fit(*callbacks, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])), scaler.state_dict()

    callback = GovernorCallback("random", authority=WIDE, mode="shadow")
    assert same(list(train(callback)), list(train()))
    assert 0 < callback.governor.summary()["decisions"] < BATCHES * EPOCHS


# ---- skip and roll back


def test_a_skipped_step_changes_neither_weights_nor_moments(fit):
    script = [NEUTRAL, NEUTRAL, Action(directive=Directive.SKIP)]
    callback = GovernorCallback(Scripted(*script))
    history = fit(callback).history  # before each batch
    assert same(history[3], history[2])
    assert not same(history[2], history[1])
    assert not same(history[4], history[3])
    assert callback.governor.summary()["skips"] == 1


def test_a_poisoned_batch_is_skipped_by_the_guard(fit, make_mlp):
    module = Regression(make_mlp())
    module.poisoned = {3}
    callback = GovernorCallback("lbw-guard")
    fit(callback, module=module)
    assert same(module.history[4], module.history[3])
    assert all(torch.isfinite(w).all() for w in weights(module))
    assert callback.governor.summary()["skips"] == 1
    ungoverned = Regression(make_mlp())
    ungoverned.poisoned = {3}
    assert not torch.isfinite(weights(fit(module=ungoverned))[0]).any()


def test_a_rollback_takes_weights_moments_buffers_and_schedule_back(fit, make_mlp):
    class Counting(Regression):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.register_buffer("count", torch.zeros(()))
            self.counts: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.count += 1
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *_: Any) -> None:
            self.counts.append(self.count.item())

    script = [NEUTRAL] * 7 + [Action(directive=Directive.ROLLBACK)]
    authority = Authority(max_rollbacks=1, snapshot_every=5)
    callback = GovernorCallback(Scripted(*script), authority=authority)
    module = fit(callback, module=Counting(make_mlp()))
    assert callback.governor.summary()["rollbacks"] == 1
    assert not callback.governor.summary()["faults"]
    assert same(module.history[8], module.history[5])  # the snapshot of step 5
    assert not same(module.history[7], module.history[5])
    assert module.rates[8] == module.rates[6]  # the schedule went back to step 5, and Lightning advanced it by one
    assert module.counts[5:9] == [6, 7, 6, 7]
    assert module.finished.global_step == BATCHES * EPOCHS  # the data goes on


# ---- checkpoints


@pytest.mark.parametrize("controller", ["lbw-guard", "pid", "random", "policy"])
@pytest.mark.parametrize("every", [1, 4], ids=["each-step", "in-mid-window"])
def test_a_resumed_training_equals_the_uninterrupted_one_bit_for_bit(
    controller, every, fit, make_mlp, tmp_path, policy_folder
):
    def governance(name: str) -> GovernorCallback:
        callback = GovernorCallback(
            policy_folder if controller == "policy" else controller,
            authority=Authority(lr_scale=(1e-3, 100.0), max_rollbacks=2, snapshot_every=2),
            ledger=tmp_path / name,
            decide_every=every,
            measure_device=False,
        )
        callback.controller.decide_every = None  # a policy brings its own
        return callback

    def module() -> Regression:
        return Regression(make_mlp(), lr=0.5)

    class Stops(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == BATCHES + 2:  # two steps after the checkpoint
                raise InterruptedError

    whole, first, second = governance("whole"), governance("ledger"), governance("ledger")
    expected = fit(whole, module=module())
    saver = ModelCheckpoint(tmp_path, filename="one", save_on_train_epoch_end=True)
    with pytest.raises(InterruptedError):
        fit(first, saver, Stops(), module=module())
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)  # nothing in it needs unpickling
    assert saved["callbacks"][first.state_key]["step"] == BATCHES
    resumed = fit(second, module=module(), resume=tmp_path / "one.ckpt")

    assert same(weights(resumed), weights(expected))
    assert resumed.finished.global_step == BATCHES * EPOCHS
    assert (tmp_path / "ledger").read_text() == (tmp_path / "whole").read_text()  # no step twice, none missing
    summary, wanted = second.governor.summary(), whole.governor.summary()
    assert {k: v for k, v in summary.items() if k != "overhead_seconds"} == {
        k: v for k, v in wanted.items() if k != "overhead_seconds"
    }


def test_a_checkpoint_after_the_training_holds_the_governor_too(fit, make_mlp, tmp_path):
    callback = GovernorCallback("pid", authority=WIDE)
    module = fit(callback)
    module.finished.save_checkpoint(tmp_path / "end.ckpt")
    longer = GovernorCallback("pid", authority=WIDE)
    fit(longer, resume=tmp_path / "end.ckpt", max_epochs=EPOCHS + 1)
    assert longer.governor.summary()["decisions"] == BATCHES * (EPOCHS + 1)


def test_an_ungoverned_checkpoint_is_resumed_at_its_step(fit, tmp_path):
    alone = fit(max_epochs=1)
    alone.finished.save_checkpoint(tmp_path / "one.ckpt")
    controller = Scripted()
    fit(GovernorCallback(controller), resume=tmp_path / "one.ckpt")
    assert [t.step for t in controller.seen] == list(range(BATCHES, BATCHES * EPOCHS))
    assert controller.seen[0].progress == 0.5


def test_another_controller_starts_anew_on_a_checkpoint(fit, tmp_path):
    fit(GovernorCallback("lbw-guard"), max_epochs=1).finished.save_checkpoint(tmp_path / "one.ckpt")
    callback = GovernorCallback("pid")
    fit(callback, resume=tmp_path / "one.ckpt")
    assert callback.governor.step == BATCHES * EPOCHS
    assert callback.governor.summary()["decisions"] == BATCHES


def test_a_state_that_cannot_be_restored_costs_the_controller_its_past_and_no_more(fit, tmp_path, caplog):
    callback = GovernorCallback("pid")
    fit(callback, max_epochs=1).finished.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    del saved["callbacks"][callback.state_key]["enforcer"]
    torch.save(saved, tmp_path / "one.ckpt")
    again = GovernorCallback("pid")
    assert fit(again, resume=tmp_path / "one.ckpt").finished.global_step == BATCHES * EPOCHS
    assert "the governor starts anew, its state could not be restored: KeyError: 'enforcer'" in caplog.text
    assert again.governor.summary()["decisions"] == BATCHES
    assert again.governor.step == BATCHES * EPOCHS


def test_a_state_read_for_an_evaluation_is_not_taken_into_the_next_training(fit, make_trainer, make_mlp, tmp_path):
    fit(GovernorCallback("pid")).finished.save_checkpoint(tmp_path / "end.ckpt")
    callback = GovernorCallback("pid")
    trainer = make_trainer(callback)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.validate(Regression(make_mlp()), rows(1), ckpt_path=tmp_path / "end.ckpt", verbose=False)
        assert callback.governor is None
        trainer.fit(Regression(make_mlp()), rows())
    assert callback.governor.summary()["decisions"] == BATCHES * EPOCHS


# ---- logs


@pytest.mark.parametrize("accumulate", [1, 2])
def test_signals_and_scales_reach_the_loggers_and_not_the_progress_bar(accumulate, fit, tmp_path):
    callback = GovernorCallback("random", authority=WIDE, ledger=tmp_path / "ledger.jsonl")
    logger = CSVLogger(tmp_path, name="csv", version=0)
    module = fit(callback, logger=logger, log_every_n_steps=3, accumulate_grad_batches=accumulate)
    with open(tmp_path / "csv/version_0/metrics.csv") as file:
        logged = [row for row in csv.DictReader(file) if row["governor/lr_scale"]]
    steps = list(range(2, BATCHES * EPOCHS // accumulate, 3))
    assert [int(row["step"]) for row in logged] == steps
    made = [decisions(tmp_path / "ledger.jsonl")[step] for step in steps]
    for key, values in (
        ("lr_scale", [d["executed"]["lr_scale"] for d in made]),
        ("loss", [d["telemetry"]["loss"] for d in made]),
        ("grad_norm", [d["telemetry"]["grad_norm"] for d in made]),
        ("rollbacks", [0] * len(made)),
    ):
        assert [float(row[f"governor/{key}"]) for row in logged] == pytest.approx(values)
    for metrics in (module.finished.progress_bar_metrics, module.finished.callback_metrics):
        assert not any(name.startswith("governor/") for name in metrics)


def test_tensorboard_gets_the_signals(fit, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra lbw-rl[metrics]")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = GovernorCallback("constant")
    module = fit(callback, logger=TensorBoardLogger(tmp_path, name="tb", version=0), log_every_n_steps=1)
    events = EventAccumulator(str(tmp_path / "tb/version_0"))
    events.Reload()
    assert [e.value for e in events.Scalars("governor/loss")] == pytest.approx(module.losses)
    assert [e.step for e in events.Scalars("governor/lr_scale")] == list(range(BATCHES * EPOCHS))


# ---- attaching and letting go


def hooks(optimizer: torch.optim.Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def test_it_lets_go_at_the_end_and_after_a_failure(fit, make_mlp):
    class Fails(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.global_step == 3:
                raise InterruptedError
            return super().training_step(batch, batch_idx)

    callback = GovernorCallback("random", authority=WIDE)
    module = Fails(make_mlp())
    with pytest.raises(InterruptedError):
        fit(callback, module=module)
    assert hooks(module.optimizers(use_pl_optimizer=False)) == 0
    assert callback.governor.summary()["decisions"] == 3
    assert callback.governor.optimizer.param_groups[0]["lr"] == module.rates[-1]
    first = callback.governor
    finished = fit(callback).finished
    assert callback.governor is not first
    assert hooks(finished.optimizers[0]) == 0
    assert callback.governor.summary()["decisions"] == BATCHES * EPOCHS


def test_training_on_with_the_same_trainer_goes_on_at_its_step(make_trainer, make_mlp):
    controller = Scripted()
    callback = GovernorCallback(controller)
    trainer, module = make_trainer(callback), Regression(make_mlp())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, rows())
        trainer.fit_loop.max_epochs += 1
        trainer.fit(module, rows())
    assert [t.step for t in controller.seen] == list(range(BATCHES * (EPOCHS + 1)))


def test_the_mode_changes_while_lightning_trains(fit, tmp_path):
    class Signals(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 4:
                os.kill(os.getpid(), signal.SIGUSR1)

    control = tmp_path / "control"
    control.write_text("skip")
    before = signal.getsignal(signal.SIGUSR1)
    callback = GovernorCallback("random", authority=WIDE, mode="shadow", control=control, kill_signal=signal.SIGUSR1)
    module = fit(callback, Signals())
    assert callback.governor.mode == "off"
    assert callback.governor.summary()["decisions"] == 4
    assert signal.getsignal(signal.SIGUSR1) == before
    assert module.finished.global_step == BATCHES * EPOCHS


# ---- what is refused


def test_several_optimizers_are_refused(fit, make_mlp):
    class Two(ByOneself):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.network[0], self.network[2])]

    with pytest.raises(ValueError, match=r"^optimizers: configure_optimizers made 2; accepted: 1$"):
        fit(GovernorCallback("constant"), module=Two(make_mlp()))


def test_bad_arguments_are_refused_at_once():
    with pytest.raises(ValueError, match=r"controller: unknown name 'nobody'; accepted: constant, pid"):
        GovernorCallback("nobody")
    with pytest.raises(ValueError, match=r"mode: 'advise' is unknown; accepted: off, shadow"):
        GovernorCallback(mode="advise")


# ---- several processes

RANKS = """
import logging, warnings
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lbw_rl import Authority
from lbw_rl.integrations.lightning import GovernorCallback

warnings.simplefilter("ignore")
torch.set_num_threads(1)

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))
    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.network(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.5)

class Stops(pl.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 8:
            raise InterruptedError

def fit(ledger, *callbacks, resume=None):
    authority = Authority(lr_scale=(1e-3, 100.0), max_rollbacks=1, snapshot_every=2)
    governance = GovernorCallback("lbw-guard", authority=authority, ledger=ledger, measure_device=False)
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=0.05,
        enable_checkpointing=bool(callbacks), callbacks=[governance, *callbacks])
    generator, module = torch.Generator().manual_seed(0), Module()
    rows = torch.utils.data.TensorDataset(*(torch.randn(48, n, generator=generator) for n in (8, 3)))
    try:
        trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=4), ckpt_path=resume)
    except InterruptedError:
        pass
    assert not governance.governor.summary()["faults"]
    return trainer.global_rank, [p.detach() for p in module.parameters()], governance.governor.summary()["decisions"]

rank, expected, decisions = fit("whole.jsonl")
assert decisions == 12
fit("parts.jsonl", ModelCheckpoint(".", filename="one", save_on_train_epoch_end=True), Stops())
rank, resumed, decisions = fit("parts.jsonl", resume="one.ckpt")
assert decisions == 12
assert all(torch.equal(a, b) for a, b in zip(expected, resumed))
name = ".jsonl" if rank == 0 else ".rank1.jsonl"
assert open("parts" + name).read() == open("whole" + name).read()
"""


@pytest.mark.slow
def test_two_ranks_decide_alike_and_resume_bit_for_bit(tmp_path):
    (tmp_path / "train.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    made, other = (decisions(tmp_path / f"whole{rank}.jsonl") for rank in ("", ".rank1"))
    assert [d["digest"] for d in made] == [d["digest"] for d in other]
    assert any(d["executed"]["lr_scale"] != 1 for d in made)


# ---- the two names of Lightning

OTHER_NAME = """
import sys
{before}
from lbw_rl.integrations.lightning import GovernorCallback
import pytorch_lightning as pl
import torch
assert ("lightning.pytorch" in sys.modules) is False

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

governance = GovernorCallback("constant")
pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
           enable_model_summary=False, callbacks=[governance]).fit(Module(), torch.utils.data.DataLoader(torch.ones(3, 2)))
assert governance.governor.summary()["decisions"] == 3
"""


def python(code: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "before",
    ["import pytorch_lightning", "sys.modules['lightning'] = sys.modules['lightning.pytorch'] = None"],
    ids=["in-use", "alone"],
)
def test_it_is_a_callback_of_pytorch_lightning_where_that_is_used(before, tmp_path):
    pytest.importorskip("pytorch_lightning", reason="needs the package pytorch-lightning")
    code = OTHER_NAME.format(before=before)
    if before.startswith("sys"):  # blocked, as if it was not installed
        code = code.replace('("lightning.pytorch" in sys.modules)', 'bool(sys.modules["lightning.pytorch"])')
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_without_lightning_it_says_what_is_missing(tmp_path):
    blocked = (
        "import sys\nfor name in ('lightning', 'lightning.pytorch', 'pytorch_lightning'): sys.modules[name] = None\n"
    )
    done = python(blocked + "import lbw_rl.integrations.lightning", tmp_path)
    assert (
        "ModuleNotFoundError: lbw_rl.integrations.lightning needs Lightning 2; accepted: pip install lightning"
        in done.stderr
    )
