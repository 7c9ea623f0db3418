"""Small governed runs and what is compared of them, for tests of the governor."""

import copy

import torch

from lbw_rl import Authority, Controller
from lbw_rl.action import NEUTRAL

STEPS = 50
WIDE = Authority(lr_scale=(1e-3, 100.0), momentum_scale=(0.5, 2.0), slew_up=1e6)


class Scripted(Controller):
    """Proposes what the test says: a list in order (an exception is raised), or one thing for ever."""

    name = "scripted"

    def __init__(self, *script, repeat=None):
        self.script, self.repeat, self.seen = list(script), repeat, []

    def reset(self, context):
        self.context = context

    def act(self, telemetry):
        self.seen.append(telemetry)
        proposed = self.script.pop(0) if self.script else self.repeat or NEUTRAL
        if isinstance(proposed, Exception):
            raise proposed
        return proposed


def train_lm(model, optimizer, tokens, steps=STEPS, after_step=None):
    """A plain training loop, as a user writes it."""
    for step in range(steps):
        batch = tokens(step)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if after_step is not None:
            after_step(step)


def backward(model, seed=0):
    model.zero_grad()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    loss = model(x).square().mean()
    loss.backward()
    return loss


def train_mlp(model, optimizer, governor=None, steps=10, start=0):
    for step in range(start, start + steps):
        loss = backward(model, step)
        if governor is not None:
            governor.observe(loss, tokens=4)
        optimizer.step()


def bits(model, optimizer=None):
    state = {} if optimizer is None else optimizer.state_dict()["state"]
    return copy.deepcopy((model.state_dict(), state))


def same_bits(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def executed_rates(optimizer):
    """Spies on the learning rate that the optimizer's own update sees; attach it after the governor."""
    rates = []
    optimizer.register_step_pre_hook(lambda opt, *_: rates.append(float(opt.param_groups[0]["lr"])))
    return rates
