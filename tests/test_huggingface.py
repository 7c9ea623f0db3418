"""The callback in a real Hugging Face Trainer, on a real (tiny) Qwen2 model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")
pytest.importorskip("accelerate", reason="needs the extra lbw-rl[hf]")

from lbw_rl import Authority, load_controller  # noqa: E402
from lbw_rl.integrations.huggingface import GovernorCallback  # noqa: E402

WIDE = Authority(lr_scale=(1e-3, 100.0), momentum_scale=(0.5, 2.0))
STEPS, LR = 6, 3e-2


class Text(torch.utils.data.Dataset):
    """Rows of a short cycle with some noise: something that can be learned in a few steps."""

    def __init__(self, ignored: int = 0) -> None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(48, (64, 8), generator=generator)
        cycle = (torch.arange(8) + torch.randint(48, (64, 1), generator=generator)) % 48
        self.rows = torch.where(torch.rand(64, 8, generator=generator) < 0.2, noise, cycle)
        self.labels = self.rows.clone()
        for row in range(0, 64, 3):  # rows of different length: the label -100 is no target
            self.labels[row, 8 - ignored :] = -100

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.labels[index]}


class Seen(transformers.TrainerCallback):
    """A tracker that comes after the governor's callback."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.rates: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        self.logs.append(dict(logs or {}))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])


@pytest.fixture
def train(make_lm, tmp_path):
    """Trains the same model on the same data; the Trainer, afterwards."""

    def go(*callbacks: Any, data: Text | None = None, resume: str | None = None, **changes: Any) -> Any:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "trainer"),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "learning_rate": LR,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "seed": 3,
        }
        trainer = transformers.Trainer(
            make_lm(),
            transformers.TrainingArguments(**(settings | changes)),
            train_dataset=data or Text(),
            callbacks=list(callbacks),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return go


def weights(trainer: Any) -> list[torch.Tensor]:
    return [p.detach() for p in trainer.model.parameters()]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def decisions(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_constant_and_shadow_and_off_leave_every_bit(optimizer, train, tmp_path):
    alone = train(optim=optimizer)
    for callback in (
        GovernorCallback("constant", authority=WIDE),
        GovernorCallback("lbw-guard", authority=WIDE, mode="shadow", ledger=tmp_path / f"{optimizer}.jsonl"),
        GovernorCallback("lbw-guard", authority=WIDE, mode="off"),
    ):
        governed = train(callback, optim=optimizer)
        assert same(alone, governed)
        ours = [record.get("loss") for record in governed.state.log_history]
        assert ours == [record.get("loss") for record in alone.state.log_history]
    assert len(decisions(tmp_path / f"{optimizer}.jsonl")) == STEPS


def test_it_scales_the_step_and_leaves_the_schedule(train, tmp_path):
    rates, ungoverned = Seen(), Seen()
    callback = GovernorCallback("lbw-guard", authority=WIDE, ledger=tmp_path / "ledger.jsonl")
    governed, alone = train(callback, rates, learning_rate=1.0), train(ungoverned, learning_rate=1.0)
    assert not same(governed, alone)
    summary = callback.governor.summary()
    assert summary["decisions"] == STEPS
    assert summary["interventions"] > 0
    assert not summary["faults"]
    assert not summary["suspended"]
    made = decisions(tmp_path / "ledger.jsonl")
    assert min(d["executed"]["lr_scale"] for d in made) < 0.5  # a rate of 1 is far too fast
    moved = {m["step"]: m["telemetry"]["update_ratio"] for m in made}
    assert all(math.isfinite(moved[i]) for i in range(1, STEPS))
    assert rates.rates == ungoverned.rates  # the schedule that Trainer sees and logs is the user's own
    assert [d["telemetry"]["progress"] for d in made] == pytest.approx([i / STEPS for i in range(STEPS)])
    losses = [record["loss"] for record in governed.state.log_history if "loss" in record]
    assert [d["telemetry"]["loss"] for d in made] == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("ignored", [0, 5])
def test_accumulation_decides_once_per_optimizer_step_from_the_mean_loss(ignored, train, tmp_path):
    callback = GovernorCallback("pid", authority=WIDE, ledger=tmp_path / "ledger.jsonl")
    data = Text(ignored)
    trainer = train(callback, data=data, gradient_accumulation_steps=4, max_steps=3)
    made = decisions(tmp_path / "ledger.jsonl")
    assert [d["step"] for d in made] == [0, 1, 2]
    assert callback.governor.step == trainer.state.global_step == 3
    # Trainer divides each micro-batch's loss by the tokens of all four: what it logs is their sum, not a quarter.
    logged = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    tolerance = 1e-3 if ignored == 0 else 0.1  # the mean over micro-batches of unequal length, against over tokens
    assert [d["telemetry"]["loss"] for d in made] == pytest.approx(logged, rel=tolerance)
    tokens = [d["telemetry"]["tokens_per_second"] * d["telemetry"]["step_seconds"] for d in made[1:]]
    assert tokens == pytest.approx([4 * 2 * 8] * 2)


def test_constant_under_accumulation_and_clipping_leaves_every_bit(train):
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
    assert same(train(**settings), train(GovernorCallback("constant"), **settings))


def test_the_scales_are_logged(train):
    seen = Seen()
    trainer = train(GovernorCallback("lbw-guard", authority=WIDE), seen, learning_rate=1.0)
    for records in (trainer.state.log_history, seen.logs):
        training = [record for record in records if "loss" in record]
        assert len(training) == STEPS
        assert all({"governor/lr_scale", "governor/momentum_scale"} <= set(record) for record in training)
        scales = [record["governor/lr_scale"] for record in training]
        assert scales[0] == 1.0
        assert min(scales) < 0.5
        assert training[-1]["learning_rate"] < 1.0  # the schedule's, unscaled


def test_an_evaluation_in_the_middle_is_no_training_signal(train, tmp_path):
    class Evaluates(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model = kwargs["model"].eval()
            with torch.no_grad():
                model(**{k: v.unsqueeze(0) for k, v in Text()[state.global_step].items()})
            model.train()

    ledgers = [tmp_path / "plain.jsonl", tmp_path / "evaluating.jsonl"]
    plain = train(GovernorCallback("lbw-guard", authority=WIDE, ledger=ledgers[0]))
    evaluating = train(GovernorCallback("lbw-guard", authority=WIDE, ledger=ledgers[1]), Evaluates())
    assert same(plain, evaluating)
    first, second = (decisions(ledger) for ledger in ledgers)
    assert [d["telemetry"]["loss"] for d in first] == [d["telemetry"]["loss"] for d in second]


def test_a_controller_that_fails_does_not_stop_training(train):
    class Broken(type(load_controller("constant"))):
        def act(self, telemetry: Any) -> Any:
            raise RuntimeError("broken")

    callback = GovernorCallback(Broken(), authority=Authority(suspend_after=2))
    assert same(train(callback), train())
    summary = callback.governor.summary()
    assert summary["suspended"]
    assert summary["decisions"] == STEPS


def test_a_policy_governs(train, policy_folder):
    callback = GovernorCallback(policy_folder, authority=WIDE)
    trainer = train(callback)
    assert callback.governor.summary()["decisions"] == STEPS
    assert all(torch.isfinite(p).all() for p in weights(trainer))
    assert not same(trainer, train())


def test_a_resumed_training_goes_on_at_its_step(train, tmp_path):
    train(GovernorCallback("pid"), save_strategy="steps", save_steps=4)
    callback = GovernorCallback("pid", ledger=tmp_path / "resumed.jsonl")
    trainer = train(callback, resume=str(tmp_path / "trainer/checkpoint-4"))
    assert trainer.state.global_step == STEPS
    made = decisions(tmp_path / "resumed.jsonl")
    assert [d["step"] for d in made] == [4, 5]
    assert [d["telemetry"]["progress"] for d in made] == pytest.approx([4 / STEPS, 5 / STEPS])


def test_training_twice_and_letting_go(train):
    callback = GovernorCallback("lbw-guard", authority=WIDE)
    trainer = train(callback)
    first = callback.governor
    optimizer = trainer.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    assert not inner._optimizer_step_pre_hooks
    assert not trainer.model._forward_hooks
    assert inner.param_groups[0]["lr"] == trainer.lr_scheduler.get_last_lr()[0]
    trainer.train()
    assert callback.governor is not first
    assert callback.governor.summary()["decisions"] == STEPS
    assert first.summary()["decisions"] == STEPS


def test_bad_input():
    with pytest.raises(ValueError, match=r"controller: unknown name 'nobody'; accepted: constant, pid"):
        GovernorCallback("nobody")
    callback = GovernorCallback("constant")
    assert callback.governor is None

    class NoOptimizer:
        pass

    with pytest.raises(ValueError, match=r"optimizer: NoOptimizer is no torch.optim.Optimizer"):
        callback.on_train_begin(None, None, None, optimizer=NoOptimizer())
