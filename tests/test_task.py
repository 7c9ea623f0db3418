import io
import math
import random
import sys

import numpy as np
import pytest
import torch

from lbw_rl.envs.model import ModelError, build_model, parameter_count
from lbw_rl.envs.optim import build_optimizer, build_scheduler, schedule_multiplier
from lbw_rl.envs.recipe import ModelSpec, OptimizerSpec, RecipeError, ScheduleSpec, load_recipe, override
from lbw_rl.envs.task import TrainingTask
from lbw_rl.random_state import capture_random_state, restore_random_state

pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")

SMALL = ["train.batch_size=2", "data.sequence_length=16", "data.eval_sequences=8", "train.device=cpu"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def task_of(*overrides: str, name: str = "mini-qwen2") -> TrainingTask:
    return TrainingTask(override(load_recipe(name), [*SMALL, *overrides]))


def advance(task: TrainingTask, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss, _ = task.backward()
        task.advance()
        losses.append(loss.item())
    return losses


def weights(task: TrainingTask) -> list[torch.Tensor]:
    return [p.detach().clone() for p in task.model.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def refusal(error: type[ValueError], function, *args) -> str:
    with pytest.raises(error) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- model


@pytest.mark.parametrize("name", ["mini-qwen2", "mini-llama"])
def test_mini_models_have_the_size_their_recipe_states(name):
    recipe = load_recipe(name)
    model = build_model(recipe.model, 1024, 64, seed=0)
    assert parameter_count(model) == {"mini-qwen2": 166_592, "mini-llama": 166_208}[name]
    assert 150_000 <= parameter_count(model) <= 200_000


def test_fresh_weights_depend_on_the_seed_alone():
    spec = load_recipe("mini-qwen2").model
    state = torch.get_rng_state()
    first = build_model(spec, 1024, 64, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    again, other = build_model(spec, 1024, 64, seed=3), build_model(spec, 1024, 64, seed=4)
    assert equal(list(first.parameters()), list(again.parameters()))
    assert not equal(list(first.parameters()), list(other.parameters()))


def test_models_that_cannot_be_built(tmp_path, monkeypatch):
    def build(path, vocab_size=1024, positions=64):
        return build_model(ModelSpec(path=str(path)), vocab_size, positions, 0)

    assert "is no folder" in refusal(ModelError, build, tmp_path / "absent")
    assert "has no config.json" in refusal(ModelError, build, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    message = refusal(ModelError, build, tmp_path)
    assert message.startswith(f"model.path: {str(tmp_path)!r} has no weights (*.safetensors); accepted: ")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "could not be loaded (ValueError" in refusal(ModelError, build, tmp_path)

    good = tmp_path / "good"
    model = build_model(ModelSpec(architecture="llama"), 1024, 64, seed=0)
    model.save_pretrained(good)
    assert equal(list(build(good).parameters()), list(model.parameters()))
    assert "a vocabulary of 1024, the tokenizer 2000" in refusal(ModelError, build, good, 2000)
    assert "at most 64 tokens" in refusal(ModelError, build, good, 1024, 128)
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(good, state_dict=state)
    assert "lacks 1 weights, first model.layers.1.mlp.up_proj.weight" in refusal(ModelError, build, good)

    import transformers

    def offline(path):
        raise OSError("no\nroute")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    assert "'org/name' could not be loaded (OSError: no route)" in refusal(ModelError, build, "org/name")


def test_missing_transformers_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lbw-rl\[hf\]'"):
        build_model(ModelSpec(architecture="llama"), 1024, 64, 0)


def test_dropout_of_a_pretrained_model_is_switched_off(tmp_path):
    import transformers

    config = transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    assert config.attn_pdrop > 0
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = build_model(ModelSpec(path=str(tmp_path)), 300, 32, 0)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_half_precision():
    task = task_of("model.dtype=bfloat16")
    assert next(task.model.parameters()).dtype == torch.bfloat16
    assert math.isfinite(advance(task, 1)[0])
    assert math.isfinite(task.evaluate())


# ---- optimizer and schedule


@pytest.mark.parametrize(
    ("name", "implementation", "kind"),
    [
        ("adamw", "foreach", torch.optim.AdamW),
        ("adamw", "fused", torch.optim.AdamW),
        ("sgd", "plain", torch.optim.SGD),
        ("adafactor", "plain", torch.optim.Adafactor),
    ],
)
def test_optimizers(name, implementation, kind):
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    model[0].weight.requires_grad_(False)
    spec = OptimizerSpec(name=name, implementation=implementation, weight_decay=0.1, betas=(0.8, 0.9))
    optimizer = build_optimizer(spec, model, lr=0.5)
    assert type(optimizer) is kind
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [tuple(p.shape) for p in decayed["params"]] == [(3, 4)]
    assert len(plain["params"]) == 3
    assert {g["lr"] for g in optimizer.param_groups} == {0.5}
    if name == "adamw":
        assert decayed["betas"] == (0.8, 0.9)
    model(torch.tensor([1, 2])).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (ScheduleSpec(name="constant", warmup_steps=0), [1.0] * 12),
        (ScheduleSpec(name="constant", warmup_steps=4), [0.25, 0.5, 0.75] + [1.0] * 9),
        (ScheduleSpec(name="linear", warmup_steps=2), [0.5, 1, *(1 - k / 8 for k in range(8)), 0, 0]),
        (
            ScheduleSpec(name="cosine", warmup_steps=2),
            [0.5, 1, *((1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)), 0, 0],
        ),
        (ScheduleSpec(name="wsd", warmup_steps=2, decay_fraction=0.4), [0.5] + [1] * 6 + [0.75, 0.5, 0.25, 0, 0]),
        (ScheduleSpec(name="cosine", warmup_steps=20), [(k + 1) / 20 for k in range(12)]),
    ],
)
def test_schedules_follow_their_closed_form(spec, expected):
    multiplier = schedule_multiplier(spec, total_steps=10)
    assert [multiplier(k) for k in range(12)] == pytest.approx(expected)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=3.0)
    scheduler = build_scheduler(spec, optimizer, 10)
    for factor in expected:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(3.0 * factor)
        optimizer.step()
        scheduler.step()


# ---- the task


def test_what_a_task_tells_about_itself():
    task = task_of("train.accumulation=3", "train.lr_multiplier=10", "schedule.warmup_steps=0", "train.steps=7")
    assert task.tokens_per_step == 2 * 3 * 16
    assert (task.step, task.total_steps) == (0, 7)
    assert task.optimizer.param_groups[0]["lr"] == pytest.approx(3e-2)
    assert len(task.corpus_sha256) == 64
    assert task.model.training


def test_it_learns():
    task = task_of("train.steps=40", "train.batch_size=8", "data.eval_sequences=32")
    before = task.evaluate()
    assert before == pytest.approx(math.log(1024), abs=0.3)
    losses = advance(task, 40)
    assert task.evaluate() < before - 0.5
    assert losses[-1] < losses[0]


def test_same_recipe_same_bits_other_seed_other_bits():
    first, again, other = task_of(), task_of(), task_of("train.seed=1")
    torch.manual_seed(123)  # nothing in a run draws from the global generators
    losses = advance(first, 4)
    random.seed(1)
    assert advance(again, 4) == losses
    assert equal(weights(first), weights(again))
    assert advance(other, 4) != losses


def test_micro_batches_add_up_to_the_mean_over_all_of_them():
    accumulated = task_of("train.accumulation=2")
    loss, norm = accumulated.backward()
    assert norm is None
    single = task_of("train.accumulation=1")
    micro = [accumulated._batches(0, m) for m in range(2)]
    both = torch.cat(micro)
    reference = single.model(input_ids=both, labels=both).loss
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    for a, b in zip(accumulated.model.parameters(), single.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_clipping_returns_the_norm_before_it():
    free, clipped = task_of(), task_of("optimizer.grad_clip=0.01")
    free.backward()
    loss, norm = clipped.backward()
    assert norm is not None
    assert not loss.requires_grad

    def total(task):
        return torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in task.model.parameters()])).item()

    assert norm.item() == pytest.approx(total(free), rel=1e-5)
    assert total(clipped) == pytest.approx(0.01, rel=1e-3)


def test_evaluation_does_not_depend_on_the_batch_and_disturbs_nothing(monkeypatch):
    task = task_of()
    state = torch.get_rng_state()
    loss = task.evaluate()
    assert task.evaluate() == loss
    monkeypatch.setattr("lbw_rl.envs.task._EVAL_LOGITS", 3 * 16 * 1024)  # 8 sequences as 3 + 3 + 2
    assert task.evaluate() == pytest.approx(loss, rel=1e-5)
    assert task.model.training
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        next(task.model.parameters()).fill_(math.nan)
    assert math.isnan(task.evaluate())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(optimizer):
    settings = [f"optimizer.name={optimizer}", "optimizer.grad_clip=1.0", "train.accumulation=2"]
    straight = task_of(*settings)
    losses = advance(straight, 7)
    interrupted = task_of(*settings)
    assert advance(interrupted, 3) == losses[:3]
    file = io.BytesIO()
    torch.save(interrupted.state_dict(), file)
    file.seek(0)
    resumed = task_of(*settings)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.step == 3
    assert advance(resumed, 4) == losses[3:]
    assert equal(weights(resumed), weights(straight))
    assert resumed.optimizer.param_groups[0]["lr"] == straight.optimizer.param_groups[0]["lr"]
    assert resumed.evaluate() == straight.evaluate()


def test_checkpoints_of_other_runs_are_refused():
    state = task_of().state_dict()
    wider = task_of("model.intermediate_size=128")
    assert "does not fit the recipe's model" in refusal(ValueError, wider.load_state_dict, state)
    other = {**state, "corpus_sha256": "0" * 64}
    assert "sha256 000000000000…" in refusal(ValueError, task_of().load_state_dict, other)


def test_random_state_round_trip():
    random.gauss(0, 1)  # leaves a spare value in Python's and numpy's generators
    np.random.standard_normal()  # noqa: NPY002

    def draw():
        return random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()  # noqa: NPY002

    file = io.BytesIO()
    torch.save(capture_random_state(), file)
    file.seek(0)
    drawn = draw()
    restore_random_state(torch.load(file, weights_only=True))
    assert draw() == drawn


def test_a_saved_model_loads_back_through_model_path(tmp_path, capfd):
    task = task_of()
    advance(task, 2)
    capfd.readouterr()
    task.save_pretrained(tmp_path)
    loaded = task_of(f"model.path={tmp_path}", "data.tokenizer=model")
    assert capfd.readouterr().err == ""  # no progress bars in a pipe
    assert equal(weights(loaded), weights(task))
    assert loaded.evaluate() == task.evaluate()
    assert torch.equal(loaded._batches(0), task._batches(0))  # same tokenizer, same tokens
    longer = task_of(f"model.path={tmp_path}", "data.tokenizer=model", "data.sequence_length=256")
    assert math.isfinite(advance(longer, 1)[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_absent_device_is_refused():
    assert refusal(RecipeError, task_of, "train.device=cuda").startswith("train.device: 'cuda' is not available")


def test_threads_are_set():
    task_of("train.threads=2")
    assert torch.get_num_threads() == 2
