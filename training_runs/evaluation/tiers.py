"""What controllers are judged on: tiers of proxy tasks, from those that policies learn on to those that nothing has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lbw_rl.envs.families.lora import LoRAShape
from lbw_rl.envs.families.transformer import FleetShape
from lbw_rl.envs.mixture import ProxyKind
from lbw_rl.envs.proxy_data import BatchShape
from lbw_rl.envs.tasks import TRAINING_CORPORA, WIDE, Tasks, sample_tasks

MULTIPLIERS = (1 / 30, 1.0, 30.0)
"""Of a task's learning rate, the best constant one of its family."""
SEEDS = 2
TIER_SEED = 8_000_000_000
"""Past the seeds that training and its own evaluation draw tasks from."""


@dataclass(frozen=True, slots=True)
class Tier:
    """Tasks that are held out in one respect.

    Attributes:
        name: what results call it.
        held_out: in what respect, in words.
        kind: of its proxies; its learning-rate errors are replaced by `MULTIPLIERS`.
        tasks: how many.
    """

    name: str
    held_out: str
    kind: ProxyKind
    tasks: int

    def draw(self) -> Tasks:
        """Its tasks at `MULTIPLIERS` and `SEEDS`; the run of task t, multiplier m and seed s is at (t · M + m) · S + s.

        Seeds differ in initial weights, language and batches, and are shared by the multipliers.
        """
        kind = self.kind
        rng = np.random.default_rng([TIER_SEED, *self.name.encode()])
        tasks = sample_tasks(
            rng,
            self.tasks,
            horizon=kind.horizon,
            multiple=8,  # of the steps between decisions that a policy may be made for
            tuned_lr=kind.shape.tuned_lr,
            well_tuned=1.0,
            model=kind.shape.name,
            corpora=kind.drawn_corpora,
            variety=kind.variety,
        )
        seeds = rng.integers(0, 2**62, (self.tasks, SEEDS))
        m, s = len(MULTIPLIERS), SEEDS
        drawn = tasks.take(np.repeat(np.arange(self.tasks), m * s))
        errors = np.tile(np.repeat(MULTIPLIERS, s), self.tasks)
        return replace(
            drawn, lr=drawn.lr * errors, lr_error=errors, seed=np.repeat(seeds[:, None], m, axis=1).reshape(-1)
        )


_DEFAULT = ProxyKind(horizon=(48, 256), variety=WIDE)
_ODD = replace(WIDE, batches=(0.125,), init_scale=(2.0, 3.0), noisy=1.0, label_noise=(0.3, 0.4))

TIERS: tuple[Tier, ...] = (
    Tier("in distribution", "only the tasks themselves", _DEFAULT, 16),
    Tier(
        "validation",
        "a Qwen2-style model, and grammar text; what a policy is chosen on",
        ProxyKind(shape=FleetShape(qkv_bias=True), horizon=(48, 256), variety=WIDE, split="validation"),
        16,
    ),
    Tier(
        "validation on tokens",
        "a Qwen2-style model, and a vocabulary of 1024 on the tokens of a text; what a policy is chosen on as well",
        ProxyKind(
            shape=FleetShape(vocab=1024, qkv_bias=True),
            batch=BatchShape(8, 48, 8),
            horizon=(96, 192),
            split="validation",
            corpora=("python-source",),
        ),
        8,
    ),
    Tier(
        "hyperparameters",
        "initial weights two to three times as large, the smallest batches, more label noise than was trained on",
        replace(_DEFAULT, variety=_ODD),
        16,
    ),
    Tier(
        "adapters",
        "the kind of run: low-rank adapters on a frozen pretrained model, on every corpus",
        ProxyKind(shape=LoRAShape(), horizon=(48, 256), variety=replace(WIDE, init_scale=(1.0, 1.0)), split="test"),
        16,
    ),
    Tier("corpus", "the language: nested brackets", replace(_DEFAULT, split="test"), 16),
    Tier("longer", "the length: 768 to 1024 steps", ProxyKind(horizon=(768, 1024)), 8),
    Tier(
        "larger",
        "the size: 20 times the weights of the default proxy, three layers",
        ProxyKind(shape=FleetShape(width=96, layers=3, heads=4, ffn=176), horizon=(128, 192), corpora=TRAINING_CORPORA),
        4,
    ),
)


def tiers_named(names: Sequence[str]) -> tuple[Tier, ...]:
    """The tiers of those names; all of them for none.

    Raises:
        ValueError: one is unknown; lists the known ones.
    """
    known = {tier.name: tier for tier in TIERS}
    for name in names:
        if name not in known:
            raise ValueError(f"tiers: {name!r} is unknown; accepted: {', '.join(known)}")
    return tuple(known[name] for name in names) if names else TIERS
