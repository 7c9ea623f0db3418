"""Small runs for tests of hard cases."""

import math

import torch

from lbw_rl import Action, Authority, Controller

FREE = Authority(lr_scale=(1e-3, 100.0), slew_up=1e6, max_rollbacks=1, snapshot_every=100, rollback_cooldown=0)


class Acts(Controller):
    """Acts by a function of the number of the decision."""

    name = "acts"

    def __init__(self, act=lambda n: Action()):
        self.function = act

    def reset(self, context):
        self.n = -1
        self.seen = []

    def act(self, telemetry):
        self.n += 1
        self.seen.append(telemetry)
        return self.function(self.n)


def backward(model, step=0, poisoned=False):
    model.zero_grad()
    loss = model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().mean()
    (loss * math.nan if poisoned else loss).backward()
    return loss


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Interrupted(torch.optim.SGD):
    """A step that can be made to raise in the middle."""

    fails = False

    def step(self, closure=None):
        if self.fails:
            raise KeyboardInterrupt
        return super().step(closure)
