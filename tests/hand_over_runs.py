"""Runs whose steps are handed over to SGD, and every Adam that they are tried on."""

import copy
import json

import torch

from lbw_rl import Action, Authority, Controller
from lbw_rl.sgd_rate import HALF_LIFE

PERMITTED = Authority(hand_over=True, lr_scale=(1e-3, 10.0), momentum_scale=(0.5, 2.0), slew_up=1e6)
KNOWN = int(HALF_LIFE) + 10  # a step by which the rate is known in the runs below

ADAMS = {
    "adamw": (torch.optim.AdamW, {}),
    "adamw-plain": (torch.optim.AdamW, {"foreach": False}),
    "adamw-foreach": (torch.optim.AdamW, {"foreach": True}),
    "adamw-fused": (torch.optim.AdamW, {"fused": True}),
    "adamw-amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "adamw-maximize": (torch.optim.AdamW, {"maximize": True}),
    "adamw-tensor-lr": (torch.optim.AdamW, {"lr": torch.tensor(3e-3)}),
    "adamw-no-decay": (torch.optim.AdamW, {"weight_decay": 0.0}),
    "adamw-no-momentum": (torch.optim.AdamW, {"betas": (0.0, 0.99)}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.1}),
    "adam-decoupled": (torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adam-fused-maximize": (torch.optim.Adam, {"weight_decay": 0.1, "fused": True, "maximize": True}),
}
EXACT = {name for name in ADAMS if "fused" not in name}  # a fused kernel rounds in another order


class Asks(Controller):
    """Asks for the hand-over at the steps that `when` says, with further fields of the action."""

    name = "asks"
    time_limit = None

    def __init__(self, when=lambda step: True, **fields):
        self.when, self.fields, self.seen = when, fields, []

    def reset(self, context):
        pass

    def act(self, telemetry):
        self.seen.append(telemetry)
        return Action(hand_over=self.when(telemetry.step), **self.fields)


def make_model():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))


def make_adam(name, model, lr=3e-3):
    cls, options = ADAMS[name]
    return cls(model.parameters(), **{"lr": lr, **copy.deepcopy(options)})


def two_groups(model, lr=3e-3):
    first, second = list(model[0].parameters()), list(model[2].parameters())
    groups = [{"params": first, "weight_decay": 0.2}, {"params": second, "lr": lr / 3, "betas": (0.8, 0.99)}]
    return torch.optim.AdamW(groups, lr=lr)


def backward(model, step):
    model.zero_grad()
    generator = torch.Generator().manual_seed(int(step))
    x = torch.randn(16, 8, generator=generator)
    target = torch.stack([x[:, 0] * x[:, 1], x[:, 2], x[:, 3].abs()], 1)
    loss = (model(x) - target).square().mean()
    loss.backward()
    return loss


def train(model, optimizer, steps, start=0, scheduler=None):
    for step in range(start, start + steps):
        backward(model, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def bits(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def decisions(path):
    return [r for line in path.read_text().splitlines() if (r := json.loads(line))["type"] == "decision"]


def matrices(model):
    return [p for p in model.parameters() if p.ndim == 2]
