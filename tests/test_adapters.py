"""LoRA in a training run: what is trained, what a checkpoint holds, what the governor sees, what is saved."""

import io
import json
import math
from pathlib import Path

import pytest
import torch

from lbw_rl.envs.model import ModelError, build_model, parameter_count
from lbw_rl.envs.recipe import ModelSpec, RecipeError, load_recipe, override
from lbw_rl.envs.task import TrainingTask
from lbw_rl.ledger import read_ledger
from lbw_rl.training_runs.run import run

pytest.importorskip("peft", reason="needs the extra lbw-rl[hf]")
load_file = pytest.importorskip("safetensors.torch").load_file


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny) -> Path:
    """The folder of a model that was trained for a few steps, with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    task = TrainingTask(override(load_recipe("mini-qwen2"), [*tiny, "optimizer.lr=1e-2"]))
    for _ in range(6):
        task.backward()
        task.advance()
    task.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(base, tiny):
    """Settings of `mini-qwen2-lora` on that model."""
    of_the_run = [s for s in tiny if not s.startswith("model.")]
    return [*of_the_run, f"model.path={base}", "model.lora_rank=2", "model.lora_alpha=8"]


@pytest.fixture
def task_of(settings):
    return lambda *more: TrainingTask(override(load_recipe("mini-qwen2-lora"), [*settings, *more]))


def advance(task, steps):
    losses = []
    for _ in range(steps):
        loss, _ = task.backward()
        task.advance()
        losses.append(loss.item())
    return losses


def trained(task):
    return {n: p.detach().clone() for n, p in task.model.named_parameters() if p.requires_grad}


def frozen(task):
    return {n: p.detach().clone() for n, p in task.model.named_parameters() if not p.requires_grad}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_the_adapters_alone_are_trained_and_start_as_the_base(task_of, base, settings):
    task = task_of()
    plain = TrainingTask(override(load_recipe("mini-qwen2-lora"), [*settings, "model.lora_rank=none"]))
    assert task.evaluate() == plain.evaluate()  # B = 0
    hidden, inner, rank, key_value = 16, 32, 2, 8
    of_q_o, of_k_v, of_mlp = 2 * (hidden + hidden), 2 * (hidden + key_value), 3 * (hidden + inner)
    assert sum(t.numel() for t in trained(task).values()) == rank * (of_q_o + of_k_v + of_mlp)
    assert parameter_count(task.model) - sum(t.numel() for t in trained(task).values()) == parameter_count(plain.model)
    assert {id(p) for g in task.optimizer.param_groups for p in g["params"]} == {
        id(p) for p in task.model.parameters() if p.requires_grad
    }
    before = frozen(task), trained(task)
    advance(task, 3)
    assert equal(frozen(task), before[0])
    assert not any(torch.equal(trained(task)[n], before[1][n]) for n in before[1])


def test_the_output_layer_has_no_adapter_even_where_it_is_not_tied(tmp_path):
    build_model(ModelSpec(architecture="llama", tie_embeddings=False), 300, 64, 0).save_pretrained(tmp_path)
    every = build_model(ModelSpec(path=str(tmp_path), lora_rank=2), 300, 64, 0)
    attention = build_model(ModelSpec(path=str(tmp_path), lora_rank=2, lora_targets="attention"), 300, 64, 0)

    def adapted(model):
        return {n.split(".")[-4] for n, p in model.named_parameters() if p.requires_grad}

    assert adapted(attention) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert adapted(every) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_one_step_is_that_of_the_low_rank_product(base, settings):
    """ΔW = (alpha / rank) B A: the adapted layer's output against the definition, after some training."""
    task = TrainingTask(override(load_recipe("mini-qwen2-lora"), settings))
    advance(task, 3)
    layer = task.model.base_model.model.model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x @ (layer.base_layer.weight + 8 / 2 * b @ a).T, rtol=1e-5, atol=1e-5)


def test_the_seed_decides_the_adapters_and_nothing_else_is_drawn(task_of):
    state = torch.get_rng_state()
    first = task_of()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(11)
    assert equal(trained(task_of()), trained(first))
    other = task_of("train.seed=1")
    assert not equal(trained(other), trained(first))
    assert equal(frozen(other), frozen(first))


def test_adapters_of_a_bfloat16_base_are_float32(task_of):
    task = task_of("model.dtype=bfloat16")
    assert {p.dtype for p in task.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in task.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert math.isfinite(advance(task, 2)[-1])
    assert math.isfinite(task.evaluate())


def test_a_checkpoint_holds_the_adapters_alone_and_resumes_bit_for_bit(task_of, base):
    straight, interrupted = task_of(), task_of()
    losses = advance(straight, 6)
    assert advance(interrupted, 2) == losses[:2]
    assert interrupted.state_dict()["model"].keys() == trained(interrupted).keys()
    file = io.BytesIO()
    torch.save(interrupted.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = task_of()
    resumed.load_state_dict(state)
    assert advance(resumed, 4) == losses[2:]
    assert equal(trained(resumed), trained(straight))

    with pytest.raises(ValueError, match="does not fit the recipe's model") as caught:
        task_of("model.lora_rank=3").load_state_dict(state)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="does not fit the recipe's model"):
        task_of("model.lora_targets=attention").load_state_dict(state)
    with pytest.raises(
        ValueError, match="does not fit the recipe's model"
    ):  # a whole model's checkpoint is none of an adapted one
        task_of("model.lora_rank=none").load_state_dict(state)


def test_a_checkpoint_is_refused_on_another_base(task_of, base, tiny, tmp_path):
    state = task_of().state_dict()
    other = TrainingTask(override(load_recipe("mini-qwen2"), [*tiny, "train.seed=1"]))
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"other frozen weights than model.path {str(tmp_path)!r}"):
        task_of(f"model.path={tmp_path}").load_state_dict(state)


def test_what_is_saved_goes_on_as_the_same_model(task_of, base, tmp_path, capfd):
    task = task_of()
    advance(task, 6)
    capfd.readouterr()
    task.save_pretrained(tmp_path / "adapters")
    assert capfd.readouterr().err == ""
    saved = load_file(tmp_path / "adapters/adapter_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == sum(t.numel() for t in trained(task).values())
    assert json.loads((tmp_path / "adapters/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    merged = task_of(f"model.path={tmp_path / 'adapters'}", "model.lora_rank=none")
    assert merged.evaluate() == pytest.approx(task.evaluate(), abs=1e-5)
    assert all(p.requires_grad for p in merged.model.parameters())
    assert advance(merged, 1)[0] > 0
    # Adapters upon adapters: each folder names the one before as its base.
    again = task_of(f"model.path={tmp_path / 'adapters'}")
    assert again.evaluate() == pytest.approx(task.evaluate(), abs=1e-5)
    advance(again, 2)
    again.save_pretrained(tmp_path / "more")
    last = task_of(f"model.path={tmp_path / 'more'}", "model.lora_rank=none")
    assert last.evaluate() == pytest.approx(again.evaluate(), abs=1e-5)


def test_adapters_that_cannot_be_had_or_used(tmp_path, base, task_of):
    def refusal(error, function, *args):
        with pytest.raises(error) as caught:
            function(*args)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    recipe = load_recipe("mini-qwen2")
    assert "lora_rank needs path" in refusal(RecipeError, override, recipe, ["model.lora_rank=4"])

    import transformers

    config = transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    spec = ModelSpec(path=str(tmp_path / "gpt2"), lora_rank=2, lora_targets="attention")
    message = refusal(ModelError, build_model, spec, 300, 32, 0)
    assert message.startswith("model.lora_targets: 'attention'")
    assert "accepted: 'all-linear'" in message

    folder = tmp_path / "adapters"
    folder.mkdir()

    def load():
        return refusal(ModelError, build_model, ModelSpec(path=str(folder)), 300, 16, 0)

    for content, complaint in (
        ("{", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"base_model_name_or_path": null}', "names no base model"),
        ('{"base_model_name_or_path": "/absent/base"}', "no adapter_model.safetensors"),
    ):
        (folder / "adapter_config.json").write_text(content)
        message = load()
        assert message.startswith(f"model.path: {str(folder)!r} holds LoRA adapters that cannot be used: ")
        assert complaint in message
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert "'/absent/base' is no folder" in load()


def test_a_governor_sees_a_finite_ratio_from_the_first_step_on(settings, tmp_path):
    """A ≠ 0 is in the sample with B = 0, so that the ratio of all adapters together exists."""
    recipe = override(load_recipe("mini-qwen2-lora"), [*settings, "controller.name=lbw-guard"])
    summary = run(recipe, tmp_path / "out")
    assert summary["governor"]["faults"] == {}
    assert not summary["diverged"]
    decisions = [line for line in read_ledger(tmp_path / "out/ledger.jsonl") if line["type"] == "decision"]
    ratios = [d["telemetry"]["update_ratio"] for d in decisions[1:]]
    assert len(ratios) == 5
    assert all(r is not None and math.isfinite(r) and 0 < r < 1 for r in ratios)
    (header,) = [line for line in read_ledger(tmp_path / "out/ledger.jsonl") if line["type"] == "header"]
    assert header["context"]["low_rank"] is True
    assert (tmp_path / "out/model/adapter_config.json").is_file()
