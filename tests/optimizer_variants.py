"""Every optimizer of torch, and one step of each by hand."""

import copy

import torch

from lbw_rl import Action, Authority, Controller

WIDE = Authority(lr_scale=(1e-3, 100.0), momentum_scale=(0.1, 4.0), slew_up=1e6)


STEPS = 8


# name → class and keyword arguments. Learning rates are those of `GROUP_RATES`.
VARIANTS = {
    "Adadelta": (torch.optim.Adadelta, {}),
    "Adafactor": (torch.optim.Adafactor, {"weight_decay": 0.01}),
    "Adagrad": (torch.optim.Adagrad, {"weight_decay": 0.01}),
    "Adam": (torch.optim.Adam, {"weight_decay": 0.01}),
    "Adamax": (torch.optim.Adamax, {}),
    "AdamW": (torch.optim.AdamW, {}),
    "ASGD": (torch.optim.ASGD, {"weight_decay": 0.01}),
    "Muon": (torch.optim.Muon, {}),
    "NAdam": (torch.optim.NAdam, {"decoupled_weight_decay": True, "weight_decay": 0.01}),
    "RAdam": (torch.optim.RAdam, {"decoupled_weight_decay": True, "weight_decay": 0.01}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "Rprop": (torch.optim.Rprop, {}),
    "SGD": (torch.optim.SGD, {}),
    "SGD-momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 1e-3}),
    "SGD-nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "SGD-fused": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-3, "fused": True}),
    "SGD-maximize": (torch.optim.SGD, {"momentum": 0.9, "maximize": True}),
    "Adagrad-fused": (torch.optim.Adagrad, {"fused": True}),
    "Adam-decoupled": (torch.optim.Adam, {"decoupled_weight_decay": True, "weight_decay": 0.01}),
    "Adam-fused": (torch.optim.Adam, {"fused": True, "weight_decay": 0.01}),
    "AdamW-fused": (torch.optim.AdamW, {"fused": True}),
    "AdamW-fused-amsgrad": (torch.optim.AdamW, {"fused": True, "amsgrad": True}),
    "AdamW-amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "AdamW-maximize": (torch.optim.AdamW, {"maximize": True}),
    "AdamW-tensor-betas": (
        torch.optim.AdamW,
        {"betas": (torch.tensor(0.9), torch.tensor(0.999)), "foreach": False},
    ),
}


for _name in (
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "SGD",
):
    _cls, _options = VARIANTS[_name]
    VARIANTS[f"{_name}-foreach"] = (_cls, {**_options, "foreach": True})


EXCLUDED = {
    "Optimizer": "the base class",
    "LBFGS": "wants a closure: tested by itself below",
    "SparseAdam": "refuses dense gradients: tested by itself below",
}


GROUP_RATES = (0.02, 0.003)  # of two parameter groups


# Where a scale does not act on the update of its own step.
LATE = {
    "ASGD": "keeps its rate in state['eta'], computed at the end of the step before",
    "ASGD-foreach": "as ASGD",
    "Rprop": "reads the learning rate once, to set the step sizes of its first step",
}


class Scripted(Controller):
    """Proposes the given actions in order, then leaves the run alone."""

    name = "scripted"

    def __init__(self, *script):
        self.script = list(script)

    def reset(self, context):
        pass

    def act(self, telemetry):
        return self.script.pop(0) if self.script else Action()


def make_model(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3)).to(dtype)


def make_optimizer(name, model, rates=GROUP_RATES):
    cls, options = VARIANTS[name]
    groups = [{"params": list(layer.parameters()), "lr": lr} for layer, lr in zip((model[0], model[2]), rates)]
    if cls is torch.optim.Muon:  # matrices only
        for group in groups:
            group["params"] = [p for p in group["params"] if p.ndim == 2]
    return cls(groups, **copy.deepcopy(options))


def backward(model, step):
    model.zero_grad()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).to(model[0].weight.dtype)
    loss = model(x).square().mean()
    loss.backward()
    return loss


def bits(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def same_bits(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def scaled_momentum(momentum, scale):
    """An averaging horizon 1/(1−β) times `scale`, as a loop written by hand would have it."""
    return 1.0 - (1.0 - momentum) / scale


def step_by_hand(optimizer, lr_scale, momentum_scale=1.0):
    """What governance does to one step, without it."""
    before = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * lr_scale
        if momentum_scale != 1.0 and "betas" in group:
            group["betas"] = (scaled_momentum(float(group["betas"][0]), momentum_scale), *group["betas"][1:])
        elif momentum_scale != 1.0 and group.get("momentum"):
            group["momentum"] = scaled_momentum(group["momentum"], momentum_scale)
    optimizer.step()
    for group, saved in zip(optimizer.param_groups, before):
        group.update(saved)


DECOUPLED = ["AdamW", "AdamW-foreach", "AdamW-fused", "Adam-decoupled", "NAdam", "RAdam", "Muon", "Adafactor"]
