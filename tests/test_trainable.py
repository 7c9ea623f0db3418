"""What the governor reads off an optimizer before the first step: by shape alone, so that a resumed run is told the same."""

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from lbw_rl.action import Action
from lbw_rl.actuator import Actuator
from lbw_rl.trainable import trainable

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def odd(parameters, **options):
    """An optimizer of another package's, with its own idea of what these options may be."""
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for group in optimizer.param_groups:
        del group["momentum"]
        group.update(options)
    return optimizer


def models():
    return {
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES)),
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES)),
        "mlp": torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)),
    }


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_a_whole_model_is_counted_by_its_matrices_and_is_no_adapter(name):
    model = models()[name]
    told = trainable(torch.optim.AdamW(model.parameters()))
    assert told.weights == sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    assert not told.low_rank


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_lora_is_recognised_by_its_pairs_of_factors(name, rank):
    config = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(models()[name], config)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    before = trainable(optimizer)
    assert before.low_rank
    assert before.weights == model.get_nb_trainable_parameters()[0]
    with torch.no_grad():  # B is 0 before training and not after: neither may matter
        for p in model.parameters():
            p.add_(1.0)
    assert trainable(optimizer) == before


def adapted(vocab_size=64, model=Qwen2ForCausalLM, task_type="CAUSAL_LM", **options):
    base = model(Qwen2Config(**{**SIZES, "vocab_size": vocab_size}, tie_word_embeddings=False, num_labels=2))
    config = peft.LoraConfig(**{"r": 2, "target_modules": "all-linear", "task_type": task_type, **options})
    return peft.get_peft_model(base, config)


def low_rank(parameters):
    return trainable(torch.optim.AdamW([p for p in parameters if p.requires_grad])).low_rank


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"q_proj": 1, "down_proj": 5}},
        {"use_dora": True},
        {"target_modules": ["v_proj", "embed_tokens"]},
        {"model": Qwen2ForSequenceClassification, "task_type": "SEQ_CLS"},  # with a head, trained as a whole
        {"modules_to_save": ["embed_tokens"], "vocab_size": 32},  # fewer elements than the factors
    ],
    ids=str,
)
def test_lora_of_several_ranks_and_with_a_little_beside_it_is_low_rank(options):
    assert low_rank(adapted(**options).parameters())


def test_adapters_in_groups_of_their_own_are_recognised_in_whatever_way_they_are_cut():
    model = adapted()
    plus = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)  # all A, then all B
    assert [len(group["params"]) for group in plus.param_groups] == [14, 0, 14, 0]
    assert trainable(plus).low_rank
    each = [{"params": [p]} for p in model.parameters() if p.requires_grad]
    assert trainable(torch.optim.AdamW(each)).low_rank


def test_adapters_of_convolutions_are_factors_of_the_flattened_kernel():
    convolutions = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.Conv2d(32, 64, 3))
    assert not low_rank(convolutions.parameters())
    assert low_rank(peft.get_peft_model(convolutions, peft.LoraConfig(r=2, target_modules=["0", "1"])).parameters())


def test_where_embeddings_are_the_larger_part_weights_have_a_size():
    assert not low_rank(adapted(vocab_size=512, modules_to_save=["embed_tokens", "lm_head"]).parameters())


WHOLE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 256}
ARCHITECTURES = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**WHOLE, intermediate_size=88, num_key_value_heads=1)),
    "llama, wide": lambda: LlamaForCausalLM(LlamaConfig(**WHOLE, intermediate_size=256)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**WHOLE, intermediate_size=128)),
    "t5, very wide": lambda: T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=1024, num_layers=3, num_heads=4)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=256)),  # matrices transposed
}
PARTS = {
    "all": lambda name: True,
    "no embeddings": lambda name: not any(word in name for word in ("embed", "wte", "wpe", "lm_head", "shared")),
    "feed-forward alone": lambda name: "mlp" in name or "DenseReluDense" in name,
    "attention alone": lambda name: "attn" in name or "Attention" in name or "attention" in name,
    "one layer": lambda name: ".1." in name,
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_part_of_a_whole_model_is_taken_for_adapters(architecture, part):
    """Its feed-forward blocks have the shapes of factors, (4d, d) and (d, 4d), and may be all that is trained."""
    chosen = [p for name, p in ARCHITECTURES[architecture]().named_parameters() if PARTS[part](name)]
    assert any(p.ndim >= 2 for p in chosen)
    assert not low_rank(chosen)


def test_matrices_that_merely_have_a_side_in_common_are_no_adapters():
    for shapes in (((8, 64), (8, 32)), ((8, 64), (64, 4)), ((64, 8), (8, 64)), ((16, 64), (64, 16)), ((8, 64),)):
        assert not low_rank([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes])


def test_only_plain_gradient_steps_are_not_normalised():
    weight = [torch.nn.Parameter(torch.zeros(2, 2))]
    for plain in (torch.optim.SGD(weight, lr=0.1), torch.optim.SGD(weight, lr=0.1, momentum=0.9)):
        assert not trainable(plain).normalised
    for make in (torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adafactor, torch.optim.NAdam):
        assert trainable(make(weight)).normalised


def test_without_a_matrix_everything_counts():
    gains = [torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(3), requires_grad=False)]
    told = trainable(torch.optim.SGD(gains, lr=0.1))
    assert (told.weights, told.low_rank) == (5, False)


@pytest.mark.parametrize(
    ("build", "momentum"),
    [
        (lambda p: torch.optim.AdamW(p, betas=(0.95, 0.99)), 0.95),
        (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), betas=(torch.tensor(0.5), torch.tensor(0.9))), 0.5),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.7), 0.7),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0.0),
        (lambda p: torch.optim.Adafactor(p), 0.0),
        (lambda p: torch.optim.LBFGS(p), 0.0),
        (lambda p: odd(p, betas=None), 0.0),
        (lambda p: odd(p, betas=(None, 0.999)), None),
        (lambda p: odd(p, betas=None, momentum=0.6), 0.6),
        (lambda p: odd(p, momentum="nesterov"), None),
    ],
)
def test_momentum_is_what_the_optimizer_was_set_to(build, momentum):
    told = trainable(build(list(models()["mlp"].parameters())))
    assert told.momentum == momentum


@pytest.mark.parametrize("options", [{"betas": None}, {"betas": (None, 0.999)}, {"momentum": None}, {}])
def test_momentum_that_is_none_is_left_alone_when_another_one_is_asked_for(options):
    optimizer = odd(models()["mlp"].parameters(), **options)
    actuator = Actuator(optimizer)
    actuator.apply(Action(lr_scale=0.5, momentum_scale=0.5))
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.05
    assert {key: group[key] for key in options} == options
    actuator.restore()
    assert group["lr"] == 0.1


@pytest.mark.parametrize("kind", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_schedule_free_keeps_its_average_whatever_momentum_a_governor_asks_for(kind):
    """Its β is no momentum: what `eval` puts in place is the average x of z only if every step had the same one."""
    package = pytest.importorskip("schedulefree", reason="needs the extra lbw-rl[rivals]")
    evaluated = []
    for scale in (1.0, 0.5):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        optimizer = getattr(package, kind)(model.parameters(), lr=0.01)
        optimizer.train()
        assert trainable(optimizer).momentum is None
        actuator = Actuator(optimizer)
        for _ in range(10):
            model(torch.ones(2, 4)).square().mean().backward()
            actuator.apply(Action(momentum_scale=scale))
            optimizer.step()
            actuator.restore()
            optimizer.zero_grad()
        optimizer.eval()
        evaluated.append(model.weight.detach().clone())
    assert torch.equal(*evaluated)
