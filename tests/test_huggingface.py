"""The callback in a real Hugging Face Trainer, on real (tiny) models: what it sees and what it does."""

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
    LR,
    STEPS,
    WIDE,
    Poisoned,
    Scripted,
    Seen,
    States,
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

from lbw_rl import SIGNALS, Action, Authority, Directive, Governor, load_controller  # noqa: E402
from lbw_rl.integrations.huggingface import GovernorCallback  # noqa: E402

KINDS = pytest.mark.parametrize("kind", ["full", "lora"])


# --- the same as without it, and as by hand --------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("full", {"optim": "adamw_torch"}),
        ("full", {"optim": "adamw_torch_fused", "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}),
        ("full", {"optim": "sgd"}),
        ("lora", {"optim": "adamw_torch_fused", "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}),
    ],
    ids=["adamw", "fused-accumulated-clipped", "sgd", "lora"],
)
def test_constant_and_shadow_and_off_leave_every_bit(kind, changes, tmp_path):
    alone = run_trainer(tmp_path, kind=kind, **changes)
    for callback in (
        GovernorCallback("constant", authority=WIDE),
        GovernorCallback("lbw-guard", authority=WIDE, mode="shadow", ledger=tmp_path / "ledger.jsonl"),
        GovernorCallback("lbw-guard", authority=WIDE, mode="off"),
    ):
        governed = run_trainer(tmp_path, callback, kind=kind, **changes)
        assert same(alone, governed)
        assert logged(governed, "loss") == logged(alone, "loss")
        assert logged(governed, "grad_norm") == logged(alone, "grad_norm")
    assert len(decisions(tmp_path / "ledger.jsonl")) == STEPS
    assert not any("governor" in key for record in governed.state.log_history for key in record)  # off: nothing at all


def by_hand(ledger, kind, *, accumulation=1, clip=1.0, fused=True, bf16=False, lr=LR, steps=12):
    """The loop that Trainer runs, written out, with a governor that is told everything by `observe`."""
    model, data = make_model(kind), Text(3)
    names = {n for n, p in model.named_parameters() if p.ndim >= 2}
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in trained if (n in names) == matrix]} for matrix in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=fused)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 2, steps)
    options: dict[str, Any] = {"authority": WIDE, "total_steps": steps, "seed": 3, "measure_device": False}
    with Governor(optimizer, "lbw-guard", ledger=ledger, **options) as governor:
        row = 0
        for _ in range(steps):
            batches = []
            for _ in range(accumulation):
                rows = [data[(row + i) % 64] for i in range(2)]
                row += 2
                batches.append({k: torch.stack([r[k] for r in rows]) for k in rows[0]})
            targets = [(b["labels"][:, 1:] != -100).sum() for b in batches]
            for batch, own in zip(batches, targets, strict=True):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                    loss = model(**batch, num_items_in_batch=sum(targets)).loss
                loss.backward()
                governor.observe(loss.detach() * sum(targets) / own)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
            governor.observe(grad_norm=norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(
    ("kind", "hand", "changes"),
    [
        ("full", {}, {}),
        ("full", {"fused": False}, {"optim": "adamw_torch"}),
        ("full", {"accumulation": 2}, {"gradient_accumulation_steps": 2}),
        ("full", {"clip": 0.1}, {"max_grad_norm": 0.1}),
        ("full", {"clip": 0.0}, {"max_grad_norm": 0.0}),
        ("full", {"bf16": True}, {"bf16": True}),
        ("full", {"lr": 1.0}, {"learning_rate": 1.0}),
        ("lora", {}, {}),
        ("lora", {"accumulation": 2, "clip": 0.1}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}),
    ],
    ids=["plain", "unfused", "accumulated", "clipped", "unclipped", "bf16", "far-too-fast", "lora", "lora-all"],
)
def test_it_decides_and_trains_as_the_same_loop_written_by_hand(kind, hand, changes, tmp_path):
    """Every run warms up from a rate of 0, over rows of unequal length."""
    expected = by_hand(tmp_path / "hand.jsonl", kind, **hand)
    callback = GovernorCallback("lbw-guard", authority=WIDE, ledger=tmp_path / "trainer.jsonl", measure_device=False)
    trainer = run_trainer(tmp_path, callback, kind=kind, data=Text(3), max_steps=12, **changes)
    assert callback.governor.summary()["faults"] == {}
    ours, theirs = decisions(tmp_path / "trainer.jsonl"), decisions(tmp_path / "hand.jsonl")
    assert signal(ours, "learning_rate")[0] == 0.0
    assert [(d["executed"], d["regime"]) for d in ours] == [(d["executed"], d["regime"]) for d in theirs]
    assert any(d["executed"]["lr_scale"] != 1.0 for d in ours)
    for name in SIGNALS:
        assert [x is None for x in signal(ours, name)] == [x is None for x in signal(theirs, name)], name
        known = [[x for x in signal(made, name) if x is not None] for made in (ours, theirs)]
        assert known[0] == pytest.approx(known[1], rel=1e-6), name
    assert same(weights(trainer), expected)


# --- what it sees ----------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("max_grad_norm", [0.1, 0.0])
def test_the_norm_is_trainers_own_before_clipping(kind, max_grad_norm, tmp_path):
    callback = GovernorCallback("lbw-guard", authority=WIDE, ledger=tmp_path / "l.jsonl")
    trainer = run_trainer(tmp_path, callback, kind=kind, max_grad_norm=max_grad_norm)
    seen = signal(decisions(tmp_path / "l.jsonl"), "grad_norm")
    assert seen == logged(trainer, "grad_norm") == logged(trainer, "governor/grad_norm")
    assert max(seen) > 0.1


@KINDS
@pytest.mark.parametrize("ignored", [0, 5])
def test_accumulation_decides_once_per_optimizer_step_from_the_mean_loss(kind, ignored, tmp_path):
    callback = GovernorCallback("pid", authority=WIDE, ledger=tmp_path / "ledger.jsonl")
    trainer = run_trainer(tmp_path, callback, kind=kind, data=Text(ignored), gradient_accumulation_steps=4, max_steps=3)
    made = decisions(tmp_path / "ledger.jsonl")
    assert [d["step"] for d in made] == [0, 1, 2]
    assert callback.governor.step == trainer.state.global_step == 3
    # Trainer divides each micro-batch's loss by the tokens of all four: what it logs is their sum, not a quarter.
    tolerance = 1e-3 if ignored == 0 else 0.1  # the mean over micro-batches of unequal length, against over tokens
    assert signal(made, "loss") == pytest.approx(logged(trainer, "loss"), rel=tolerance)
    tokens = [d["telemetry"]["tokens_per_second"] * d["telemetry"]["step_seconds"] for d in made[1:]]
    assert tokens == pytest.approx([4 * 2 * 8] * 2)


def test_evaluations_in_between_are_no_training_signal(tmp_path):
    runs = {}
    for name, changes in {"plain": {}, "evaluating": {"eval_strategy": "steps", "eval_steps": 1}}.items():
        callback = GovernorCallback(
            "lbw-guard", authority=WIDE, ledger=tmp_path / f"{name}.jsonl", decide_every=2, measure_device=False
        )
        runs[name] = run_trainer(tmp_path, callback, evaluated=Text(), **changes)
    assert same(runs["plain"], runs["evaluating"])
    assert (tmp_path / "plain.jsonl").read_text() == (tmp_path / "evaluating.jsonl").read_text()


def test_a_hidden_loss_is_missing_and_governance_goes_on_without_it(tmp_path):
    callback = GovernorCallback("lbw-guard", authority=WIDE, ledger=tmp_path / "l.jsonl")
    run_trainer(tmp_path, callback, Poisoned(3), label_smoothing_factor=0.1)
    made = decisions(tmp_path / "l.jsonl")
    assert signal(made, "loss") == [None] * STEPS
    assert signal(made, "nonfinite") == [0, 0, 0, 1, 0, 0]  # the gradient tells
    assert any(d["executed"]["lr_scale"] != 1.0 for d in made)


def test_a_compiled_models_loss_is_seen_and_breaks_no_graph(tmp_path):
    """Also at the second `train()`, whose hooks are new to a model that is compiled already."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    callback = GovernorCallback("lbw-guard", authority=WIDE, ledger=tmp_path / "l.jsonl")
    trainer = run_trainer(tmp_path, callback, torch_compile=True, torch_compile_backend="eager", max_steps=3)
    losses = logged(trainer, "loss")
    trainer.train()
    assert signal(decisions(tmp_path / "l.jsonl"), "loss") == pytest.approx(losses + logged(trainer, "loss"), rel=1e-3)
    assert callback.governor.summary()["faults"] == {}
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


# --- what it does ----------------------------------------------------------------------------------------


def test_it_scales_the_step_and_leaves_the_schedule(tmp_path):
    rates, ungoverned = Seen(), Seen()
    callback = GovernorCallback("lbw-guard", authority=WIDE, ledger=tmp_path / "ledger.jsonl")
    governed = run_trainer(tmp_path, callback, rates, learning_rate=1.0)
    alone = run_trainer(tmp_path, ungoverned, learning_rate=1.0)
    assert not same(governed, alone)
    summary = callback.governor.summary()
    assert (summary["decisions"], summary["faults"], summary["suspended"]) == (STEPS, {}, False)
    made = decisions(tmp_path / "ledger.jsonl")
    assert min(d["executed"]["lr_scale"] for d in made) < 0.5  # a rate of 1 is far too fast
    assert all(math.isfinite(x) for x in signal(made, "update_ratio")[1:])
    assert rates.rates == ungoverned.rates  # the schedule that Trainer sees and logs is the user's own
    assert signal(made, "progress") == pytest.approx([i / STEPS for i in range(STEPS)])
    assert signal(made, "loss") == pytest.approx(logged(governed, "loss"), rel=1e-3)


@KINDS
def test_a_poisoned_batch_is_seen_and_skipped_though_trainer_filters_it_from_its_log(kind, tmp_path):
    callback, states = GovernorCallback("lbw-guard", authority=WIDE, ledger=tmp_path / "l.jsonl"), States()
    changes: dict[str, Any] = {"gradient_accumulation_steps": 2, "logging_nan_inf_filter": True, "kind": kind}
    trainer = run_trainer(tmp_path, callback, Poisoned(3), states, **changes)
    assert all(map(math.isfinite, logged(trainer, "loss")))
    made = decisions(tmp_path / "l.jsonl")
    assert signal(made, "nonfinite") == [0, 0, 0, 1, 0, 0]
    assert [d["executed"]["directive"] for d in made] == ["proceed"] * 3 + ["skip"] + ["proceed"] * 2
    assert same(states.before[3]["w"], states.after[3]["w"])
    assert same(states.before[3]["o"], states.after[3]["o"])
    assert not same(states.before[4]["w"], states.after[4]["w"])
    assert all(w.isfinite().all() for w in weights(trainer))
    assert trainer.state.global_step == STEPS
    assert logged(trainer, "governor/skips") == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [("full", "cosine"), ("lora", "cosine"), ("full", "reduce_lr_on_plateau"), ("full", "greedy")],
)
def test_a_rollback_restores_weights_optimizer_and_scheduler_bit_for_bit(kind, scheduler, tmp_path):
    authority = Authority(max_rollbacks=1, snapshot_every=3)
    controller = Scripted({7: Action(directive=Directive.ROLLBACK)})
    callback, states = GovernorCallback(controller, authority=authority, ledger=tmp_path / "l.jsonl"), States()
    changes = {"eval_strategy": "steps", "eval_steps": 1} if scheduler != "cosine" else {}
    trainer = run_trainer(
        tmp_path, callback, states, kind=kind, lr_scheduler_type=scheduler, max_steps=10, evaluated=Text(), **changes
    )
    rolled_back = decisions(tmp_path / "l.jsonl")[7]
    assert (rolled_back["executed"]["directive"], rolled_back["restored_step"]) == ("rollback", 6)
    assert same(states.after[7], states.before[6])
    assert not same(states.before[7]["w"], states.before[6]["w"])
    assert not same(states.before[8]["w"], states.after[8]["w"])  # and training goes on from there
    assert trainer.state.global_step == 10
    assert logged(trainer, "governor/rollbacks") == [0] * 7 + [1] * 3
    held = sum(t.numel() for t in callback.governor.state_dict()["snapshot"]["tensors"])
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert held == trained + sum(b.numel() for b in trainer.model.buffers())  # of LoRA's model the adapters only


def test_without_authority_for_it_no_snapshot_is_kept_and_a_rollback_is_denied(tmp_path):
    callback = GovernorCallback(Scripted({4: Action(directive=Directive.ROLLBACK)}), ledger=tmp_path / "l.jsonl")
    run_trainer(tmp_path, callback)
    assert "rollback denied" in " ".join(decisions(tmp_path / "l.jsonl")[4]["reasons"])
    assert callback.governor.state_dict()["snapshot"] is None


def test_a_controller_that_fails_does_not_stop_training(tmp_path):
    class Broken(type(load_controller("constant"))):
        def act(self, telemetry: Any) -> Any:
            raise RuntimeError("broken")

    callback = GovernorCallback(Broken(), authority=Authority(suspend_after=2))
    assert same(run_trainer(tmp_path, callback), run_trainer(tmp_path))
    summary = callback.governor.summary()
    assert summary["suspended"]
    assert summary["decisions"] == STEPS


def test_a_policy_governs(tmp_path, policy_folder):
    callback = GovernorCallback(policy_folder, authority=WIDE)
    trainer = run_trainer(tmp_path, callback)
    assert callback.governor.summary()["decisions"] == STEPS
    assert all(torch.isfinite(p).all() for p in weights(trainer))
    assert not same(trainer, run_trainer(tmp_path))


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
    assert read["train/governor/momentum_scale"] == steps_of([1.0] * STEPS)
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
    assert signals.getsignal(signals.SIGUSR1) is signals.SIG_DFL


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
