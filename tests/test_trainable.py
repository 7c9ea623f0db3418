"""What the governor reads off an optimizer before the first step: by shape alone, so that a resumed run is told the same."""

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

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
def test_lora_is_recognised_by_the_rank_that_its_factors_share(name, rank):
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


def test_matrices_that_merely_have_a_side_in_common_are_no_adapters():
    square = [torch.nn.Parameter(torch.zeros(s)) for s in ((8, 64), (64, 8), (8, 8))]
    one_way = [torch.nn.Parameter(torch.zeros(s)) for s in ((8, 64), (8, 32))]
    ranks = [torch.nn.Parameter(torch.zeros(s)) for s in ((8, 64), (64, 4))]
    for parameters in (square, one_way, ranks):
        assert not trainable(torch.optim.SGD(parameters, lr=0.1)).low_rank


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
