"""The callback in a real Hugging Face Trainer, on real (tiny) models: what it sees and what it does."""

import math
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


def test_a_loss_whose_labels_are_not_shifted_is_taken_as_it_is():
    """`num_items_in_batch` rescales the losses of causal language models alone; a classifier ignores it."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=48, num_labels=3, **sizes))
    optimizer = torch.optim.AdamW(model.train().parameters())
    with Governor(optimizer, "constant", model=model) as governor:
        tokens, labels = torch.ones(4, 8, dtype=torch.long), torch.tensor([0, 1, 2, 0])
        loss = model(input_ids=tokens, labels=labels, num_items_in_batch=torch.tensor(4)).loss
        loss.backward()
        optimizer.step()
        assert governor.last_telemetry.loss == pytest.approx(loss.item())


def test_a_model_that_sees_images_tells_its_own_mean_loss_under_accumulation():
    """Its micro-batches' losses are shares of the whole step's, as those of a causal model are."""
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    tokens = {f"{name}_token_id": n for n, name in enumerate(("image", "video", "vision_start", "vision_end"), 3)}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    model = transformers.Qwen2VLForConditionalGeneration(config).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = torch.randint(10, 64, (4, 12))
    mean = model(input_ids=batch, labels=batch).loss.item()
    with Governor(optimizer, "constant", model=model, measure_device=False) as governor:
        for part in batch:
            share = model(input_ids=part[None], labels=part[None], num_items_in_batch=4 * 11).loss
            share.backward()
        optimizer.step()
    assert share.item() < mean / 2
    assert governor.last_telemetry.loss == pytest.approx(mean, rel=1e-5)


def test_the_loss_of_a_model_that_returns_a_dict_is_heard(make_lm, tokens):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = make_lm()

        def forward(self, input_ids, labels):
            return {"loss": self.lm(input_ids=input_ids, labels=labels).loss}

    model = Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Governor(optimizer, "constant", model=model, measure_device=False) as governor:
        loss = model(tokens(0), tokens(0))["loss"]
        loss.backward()
        optimizer.step()
    assert governor.last_telemetry.loss == loss.item()
