"""A dry run's figures against the real thing: models that are built, optimizers that step, tensors that autograd keeps."""

import json
import socket
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lbw_rl.envs.model import ModelError, build_model, parameter_count
from lbw_rl.envs.optim import build_optimizer
from lbw_rl.envs.recipe import ModelSpec, OptimizerSpec, load_recipe, override
from lbw_rl.training_runs.estimate import (
    activation_bytes,
    estimate,
    flops_per_token,
    in_short,
    in_words,
    notice,
    optimizer_bytes,
)
from lbw_rl.training_runs.model_shapes import KNOWN, model_config

pytest.importorskip("peft", reason="needs the extra lbw-rl[hf]")

SHAPE = {"hidden_size": 64, "intermediate_size": 192, "num_layers": 2, "num_heads": 8, "num_kv_heads": 2}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a dry run asked the network for {args[0]!r}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("LBW_RL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model_of(tmp_path):
    """Spec fields → the recipe and the real model, pretrained if it gets adapters."""

    def make(**fields):
        spec = ModelSpec(architecture="qwen2", **{**SHAPE, **{k: v for k, v in fields.items() if "lora" not in k}})
        model = build_model(spec, 512, 256, 0)
        if "lora_rank" in fields:
            model.save_pretrained(tmp_path / "base")
            adapters = {k: v for k, v in fields.items() if "lora" in k}
            spec = ModelSpec(path=str(tmp_path / "base"), dtype=spec.dtype, **adapters)
            model = build_model(spec, 512, 256, 0)
        recipe = load_recipe("mini-qwen2").model_copy(update={"model": spec})
        return override(recipe, ["data.vocab_size=512", "train.batch_size=4", "data.sequence_length=128"]), model

    return make


# ---- the real models' sizes


@pytest.mark.parametrize(
    ("name", "base", "rank_sums"),
    [
        # rank 16 × (inputs + outputs) of q, k, v, o, gate, up, down in every layer
        ("qwen2.5-3b", 3_085_938_688, 36 * (2 * 4096 + 2 * (2048 + 256) + 3 * (2048 + 11008))),
        ("qwen2.5-7b", 7_615_616_512, 28 * (2 * 7168 + 2 * (3584 + 512) + 3 * (3584 + 18944))),
        ("qwen2.5-14b", 14_770_033_664, 48 * (2 * 10240 + 2 * (5120 + 1024) + 3 * (5120 + 13824))),
        ("tinyllama-1.1b-full", 1_100_048_384, None),
    ],
)
def test_the_real_recipes_have_the_published_sizes_without_a_network(name, base, rank_sums):
    found = estimate(load_recipe(name), tflops=1.0)
    adapters = 16 * rank_sums if rank_sums else 0
    assert found.parameters == base + adapters
    assert found.trainable == (adapters or base)
    assert found.source == f"what is published of {load_recipe(name).model.path}"
    assert found.memory["weights"] == (base * 2 + adapters * 4 if rank_sums else base * 4)
    assert found.memory["gradients"] == found.trainable * 4
    assert found.memory["optimizer state"] == found.trainable * 8
    assert found.tokens == 300 * 16 * 1024
    assert found.memory_total < 80e9  # one large accelerator is enough, as the recipes are shipped
    assert found.seconds == found.flops / 1e12


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_known_shapes_belong_to_a_recipe(name):
    recipes = ("qwen2.5-3b", "qwen2.5-7b", "qwen2.5-14b", "tinyllama-1.1b-full")
    assert name in {load_recipe(recipe).model.path for recipe in recipes}


def test_sharded_over_devices():
    recipe = load_recipe("qwen2.5-7b")
    one, four = estimate(recipe, tflops=1.0), estimate(recipe, 4, tflops=1.0)
    for item in ("weights", "gradients", "optimizer state"):
        assert four.memory[item] == -(-one.memory[item] // 4)
    assert four.memory["activations"] == one.memory["activations"]
    largest = 152064 * 3584 * 2  # the embedding, in bfloat16
    assert (one.memory["gathered layers"], four.memory["gathered layers"]) == (0, 2 * largest)
    assert four.tokens == one.tokens
    assert four.seconds == one.seconds / 4


# ---- against real models


CASES = [
    {"dtype": dtype, **lora}
    for dtype in ("float32", "bfloat16")
    for lora in ({}, {"lora_rank": 4}, {"lora_rank": 4, "lora_targets": "attention"})
]


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_activations_are_what_autograd_keeps(model_of, fields):
    kept = {}
    for layers in (2, 4):  # two depths: the difference is the layers' share
        recipe, model = model_of(num_layers=layers, **fields)
        kept[layers] = bytes_kept_for_backward(model, tokens=torch.randint(512, (4, 128)))
    measured = (kept[4] - kept[2]) / 2 / (4 * 128)
    assert activation_bytes(recipe, model.config) == pytest.approx(measured, rel=0.01)


def bytes_kept_for_backward(model, tokens) -> int:
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=tokens, labels=tokens)
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": False}, {"lora_rank": 4}], ids=str)
def test_flops_are_those_of_the_operations_that_run(model_of, fields):
    _, model = model_of(num_layers=4, **fields)
    tokens = torch.randint(512, (4, 32))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # a fused attention goes uncounted
        model(input_ids=tokens, labels=tokens).loss.backward()
    # Under LoRA nothing before the first layer is trained, so that it spares a few gradients.
    expected = tokens.numel() * flops_per_token(model, model.config, 32)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.015 if "lora_rank" in fields else 1e-9)


@pytest.mark.parametrize("fields", [{}, {"lora_rank": 4}, {"lora_rank": 4, "dtype": "bfloat16"}], ids=str)
def test_weights_are_those_of_the_model_that_is_built(model_of, fields):
    recipe, model = model_of(**fields)
    found = estimate(recipe, tflops=1.0)
    assert found.parameters == parameter_count(model)
    assert found.memory["weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.memory["optimizer step"] == found.memory["gradients"]  # foreach


def packaged(name):
    if name == "stable-adamw":
        return pytest.importorskip("pytorch_optimizer").StableAdamW
    if name == "schedule-free":
        return pytest.importorskip("schedulefree").AdamWScheduleFree
    return pytest.importorskip("prodigyopt").Prodigy


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "stable-adamw", "schedule-free", "prodigy"])
def test_optimizer_state_is_what_a_step_leaves(model_of, name):
    _, model = model_of()
    spec = OptimizerSpec(name=name)
    if name in ("adamw", "sgd", "adafactor"):
        optimizer = build_optimizer(spec, model, 1e-3)
    else:
        optimizer = packaged(name)(model.parameters(), lr=1e-3)
        getattr(optimizer, "train", lambda: None)()
    tokens = torch.randint(512, (2, 16))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    kept = sum(t.numel() * t.element_size() for t in tensors if t.numel() > 1)
    # Prodigy keeps one zero as the starting point of a tensor that starts at zero.
    assert optimizer_bytes(spec, list(model.parameters())) == pytest.approx(kept, rel=1e-3 if name == "prodigy" else 0)


# ---- where the shape comes from


def test_a_local_folder_goes_before_everything(model_of, monkeypatch, tmp_path):
    _, model = model_of()
    model.save_pretrained(tmp_path / "Qwen" / "Qwen2.5-7B")
    absolute = override(
        load_recipe("qwen2.5-7b"), [f"model.path={tmp_path}/Qwen/Qwen2.5-7B", "data.sequence_length=64"]
    )
    assert model_config(absolute)[1] == f"folder {tmp_path}/Qwen/Qwen2.5-7B"
    monkeypatch.chdir(tmp_path)  # the hub id is now the name of a folder too
    config, source = model_config(override(load_recipe("qwen2.5-7b"), ["data.sequence_length=64"]))
    assert source == "folder Qwen/Qwen2.5-7B"
    assert config.hidden_size == 64
    with pytest.raises(ModelError, match="reads at most 256 tokens"):
        estimate(load_recipe("qwen2.5-7b"))


def test_a_folder_of_adapters_has_the_shape_of_its_base(model_of, tmp_path):
    recipe, model = model_of(lora_rank=2)
    model.save_pretrained(tmp_path / "adapters", save_embedding_layers=False)
    merged = override(recipe, [f"model.path={tmp_path}/adapters", "model.lora_rank=none"])
    built = build_model(merged.model, 512, 128, 0)
    assert estimate(merged, tflops=1.0).parameters == parameter_count(built)


def test_a_model_that_a_recipe_would_train_is_not_trained(tmp_path):
    found = estimate(load_recipe("mini-qwen2-lora"), tflops=1.0)
    assert found.source == "recipe mini-qwen2-base"
    assert found.parameters - found.trainable == 166_592
    assert not (tmp_path / "cache").exists()


def test_models_without_a_shape_are_refused(tmp_path, monkeypatch):
    import transformers

    def shape(path):
        with pytest.raises(ModelError) as caught:
            model_config(override(load_recipe("qwen2.5-7b"), [f"model.path={path}"]))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is no folder" in shape(tmp_path / "absent")
    assert "no configuration that can be read" in shape(tmp_path)
    real = transformers.AutoConfig.from_pretrained

    def offline(path, **options):
        if options.get("local_files_only"):
            return real(path, **options)
        raise OSError("no\nroute")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    assert "'org/name' has no configuration that can be read (OSError: no route)" in shape("org/name")


# ---- what is printed


def test_every_line_says_what_it_assumes():
    found = estimate(override(load_recipe("tinyllama-1.1b-full"), ["authority.max_rollbacks=2"]), 2, tflops=100.0)
    text = "\n".join(in_words(found))
    for part in ("1,100,048,384 parameters", "memory per device of 2, sharded (FSDP)", "optimizer state 4.4 GB",
                 "300 steps × 16,384 tokens = 4,915,200 tokens", "100 TFLOP/s each: --tflops", "flops: per token 4·N",
                 "last good state: 6.6 GB, over the governor's budget of 2.1 GB, so that none is kept"):  # fmt: skip
        assert part in text
    measured = estimate(load_recipe("mini-qwen2"))
    assert "matrix product reaches here (cpu" in measured.assumption or torch.cuda.is_available()
    assert any("bound by overhead" in line for line in in_words(measured))
    assert in_short(found).count("\n") == 0


def test_runs_worth_a_thought_are_announced(model_of, tmp_path):
    assert notice(load_recipe("mini-qwen2")) is None
    assert notice(load_recipe("mini-qwen2-lora")) is None
    recipe, _ = model_of(lora_rank=2)
    assert notice(recipe) is None
    assert "7,655,986,688 parameters" in notice(load_recipe("qwen2.5-7b"))
    wide = override(
        load_recipe("mini-qwen2"), ["model.hidden_size=2048", "model.intermediate_size=8192", "model.num_layers=4"]
    )
    assert "--dry-run says" in notice(wide)
    for unusable in (tmp_path, tmp_path / "absent"):  # the run itself will say what is missing
        assert notice(override(recipe, [f"model.path={unusable}"])) is None


def test_dry_run_command(lbw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = lbw("run", "qwen2.5-14b", "--dry-run", "--devices", "8", "--tflops", "300", "--json")
    assert answer.code == 0
    found = json.loads(answer.out)
    assert found["parameters"] - found["trainable"] == 14_770_033_664
    assert found["devices"] == 8
    assert found["memory_total"] == sum(found["memory"].values())
    answer = lbw("run", "mini-llama-full", "--dry-run")
    assert answer.code == 0
    assert answer.err == ""
    assert answer.out.startswith(
        "mini-llama-full: 166,208 parameters, 166,208 trained (100.00%); shape from recipe mini-llama-base"
    )
    assert list(Path(tmp_path).iterdir()) == []  # nothing was trained or written


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--dry-run", "--devices", "0"], "devices: 0 is too few; accepted: 1 or more"),
        (["--dry-run", "--tflops", "-1"], "tflops: -1.0 is no rate; accepted: a positive number"),
        (["--dry-run", "--tflops", "nan"], "tflops: nan is no rate"),
        (["--devices", "2"], "devices: 2 estimates nothing; accepted: together with --dry-run"),
        (["--tflops", "2"], "tflops: 2.0 estimates nothing; accepted: together with --dry-run"),
        (["--dry-run", "--set", "model.path=recipe:absent"], "'recipe:absent' names no usable recipe"),
    ],
)
def test_refused_dry_runs(lbw, tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    answer = lbw("run", "mini-qwen2-lora", *arguments)
    assert answer.code == 2
    assert complaint in answer.err
    assert answer.err.count("\n") == 1
