"""Optimizers of other packages that a run is compared with, each set up as its authors advise.

All are in the extra `lbw-rl[rivals]` and are imported when a recipe asks for them. Weight decay, moments and rate are
the recipe's; what else there is to choose is chosen here, once:

| name | class | chosen |
|---|---|---|
| stable-adamw | `pytorch_optimizer.StableAdamW` | no Kahan summation, so that it is AdamW with lr / max(1, RMS(g²/v)) and no more (Wortsman et al. 2304.13013, algorithm 2; v bias-corrected, one RMS per tensor) |
| schedule-free | `schedulefree.AdamWScheduleFree` | r = 0, averaging weights lr_max² (its defaults; Defazio et al. 2405.15682) |
| prodigy | `prodigyopt.Prodigy` | `safeguard_warmup`, which its README asks for wherever there is a warmup, and `use_bias_correction`, which makes it Adam's step at the rate that it finds (Mishchenko & Defazio 2306.06101); lr is the recipe's, and 1 is the one that it is made for |

What a poisoned gradient does to them: it ends the run, as with AdamW: weights and moments hold NaN from then on. Prodigy's
estimate d keeps its value, since the maximum behind it passes over NaN.

What a governed step can do to them: a withheld step (gradients `None`) still counts in the parameter groups of StableAdamW
(`step`) and Schedule-Free (`k`, `weight_sum`), which changes a bias correction or an averaging weight, and moves no weight.
Schedule-Free weighs its average by the largest rate so far, a governor's scale included. Prodigy accepts only one rate for
all parameter groups.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lbw_rl.envs.specs import OptimizerSpec
from lbw_rl.extras import require


def build_rival(spec: OptimizerSpec, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """Builds the optimizer that `spec.name` says, ready to train.

    Args:
        spec: the recipe's `[optimizer]` section; its name is one of the table above.
        groups: parameter groups with their weight decay.
        lr: peak learning rate, multiplier included.

    Raises:
        ModuleNotFoundError: its package is missing; one line that names the extra.
    """
    foreach = spec.implementation == "foreach"
    if spec.name == "stable-adamw":
        kind = _from("pytorch_optimizer", "StableAdamW")
        return kind(groups, lr=lr, betas=spec.betas, eps=spec.eps, kahan_sum=False, foreach=foreach)
    if spec.name == "schedule-free":
        # Its own warmup stays 0: the recipe's schedule warms up, to the same bits, and telemetry sees the rate.
        optimizer = _from("schedulefree", "AdamWScheduleFree")(
            groups, lr=lr, betas=spec.betas, eps=spec.eps, foreach=foreach
        )
        optimizer.train()
        return optimizer
    return _from("prodigyopt", "Prodigy")(
        groups, lr=lr, betas=spec.betas, eps=spec.eps, safeguard_warmup=True, use_bias_correction=True
    )


def _from(package: str, name: str) -> Any:
    require(package)
    return getattr(importlib.import_module(package), name)


@contextmanager
def evaluation_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Puts the weights that a run is judged by in place: Schedule-Free's average x; of other optimizers, those there are.

    Schedule-Free trains at y = β₁x + (1 − β₁)z and keeps z, so that going to x and back would round. The bits of y
    are put back from a copy (as large as the trainable weights), and an evaluation leaves no trace in the run.
    """
    if not hasattr(optimizer, "eval"):  # no optimizer of torch has it
        yield
        return
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    trained_at = [p.detach().clone() for p in weights]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for weight, value in zip(weights, trained_at):
                weight.copy_(value)
