"""The distribution of training tasks that a proxy fleet is drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbw_rl.envs.languages import CORPORA

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Mask = NDArray[np.bool_]

TUNED_LR = 1e-2
"""Best constant-error learning rate of the default proxy (`lbw_rl.training_runs.benchmarks.proxy_lr`)."""
LR_ERROR = (1e-2, 1e2)
"""Range of the learning-rate error: base peak LR / `TUNED_LR`, log-uniform."""
WELL_TUNED = 0.3
"""Share of tasks without any error, so that leaving alone is learned as well."""
SCHEDULES = ("constant", "cosine", "wsd", "linear")
MODELS = ("llama", "qwen2", "ngram", "quadratic", "lora", "fine-tuned")
FAULTS = ("none", "gradient-burst", "corrupted-batches", "lr-jump")
TRAINING_CORPORA = ("markov-1", "markov-2", "python-docs")
_SHARES = {"markov-1": 0.4, "markov-2": 0.3, "python-docs": 0.3}  # of tasks, before normalising; 1 for others
_WSD_DECAY = 0.2

LANGUAGE, WEIGHTS, NOISE = 0, 1, 2
"""Streams of a task's seed."""


@dataclass(frozen=True, slots=True)
class Tasks:
    """n training tasks; every field has shape (n,).

    Attributes:
        seed: decides the task's language, data order and initial weights.
        model: index into `MODELS`.
        lr: peak learning rate of the base run.
        lr_error: `lr` / the model's tuned learning rate.
        schedule: index into `SCHEDULES`.
        warmup: steps of linear warmup.
        beta1: decay of AdamW's first moment.
        beta2: decay of AdamW's second moment.
        weight_decay: AdamW's decoupled decay.
        clip: largest gradient norm, `inf` for none.
        horizon: optimizer steps.
        corpus: index into `CORPORA`.
        batch: share of a step's sequences that differ from one another; the rest repeat them.
        init_scale: multiple of the initial weight matrices.
        label_noise: share of the training tokens, the labels of the tokens before them, that are random.
        fault: index into `FAULTS`.
        fault_start: first step of the fault.
        fault_end: first step without it.
        fault_factor: what multiplies the gradient in a burst, or the learning rate after a jump.
        dropout: share of the device's readings that are lost.
    """

    seed: IntArray
    model: IntArray
    lr: FloatArray
    lr_error: FloatArray
    schedule: IntArray
    warmup: IntArray
    beta1: FloatArray
    beta2: FloatArray
    weight_decay: FloatArray
    clip: FloatArray
    horizon: IntArray
    corpus: IntArray
    batch: FloatArray
    init_scale: FloatArray
    label_noise: FloatArray
    fault: IntArray
    fault_start: IntArray
    fault_end: IntArray
    fault_factor: FloatArray
    dropout: FloatArray

    def __len__(self) -> int:
        return len(self.seed)

    def put(self, row: int, other: Tasks) -> None:
        """Writes the single task `other` into place `row`."""
        for f in fields(self):
            getattr(self, f.name)[row] = getattr(other, f.name)[0]

    def row(self, row: int) -> dict[str, Any]:
        """One task as plain data."""
        return {f.name: getattr(self, f.name)[row].item() for f in fields(self)}

    def take(self, rows: IntArray) -> Tasks:
        """The tasks in `rows`, copied."""
        return Tasks(*(getattr(self, f.name)[rows] for f in fields(self)))

    def generator(self, row: int, stream: int) -> np.random.Generator:
        """One of a task's own sources of randomness: `LANGUAGE`, `WEIGHTS` or `NOISE`."""
        return np.random.default_rng([int(self.seed[row]), stream])

    def has(self, fault: str, step: IntArray | int) -> Mask:
        """Which tasks have this fault at their step at hand, shape (n,)."""
        return (self.fault == FAULTS.index(fault)) & (step >= self.fault_start) & (step < self.fault_end)

    def learning_rate(self, step: IntArray) -> FloatArray:
        """Scheduled learning rates, jumps included.

        Args:
            step: optimizer steps done so far, shape (n,).

        Returns:
            Shape (n,); the shapes of `lbw_rl.envs.optim.schedule_multiplier`.
        """
        left = np.clip((self.horizon - step) / np.maximum(1, self.horizon - self.warmup), 0.0, 1.0)
        decay = np.clip((self.horizon - step) / np.maximum(1.0, _WSD_DECAY * self.horizon), 0.0, 1.0)
        shapes = (np.ones_like(left), 0.5 - 0.5 * np.cos(np.pi * left), decay, left)
        shape = np.choose(self.schedule, shapes)
        scheduled = self.lr * np.where(step < self.warmup, (step + 1) / np.maximum(1, self.warmup), shape)
        return np.where(self.has("lr-jump", step), self.fault_factor, 1.0) * scheduled

    def gradient_factor(self, step: IntArray) -> FloatArray:
        """What multiplies the gradients of the step at hand, shape (n,): 1 but in a burst."""
        return np.where(self.has("gradient-burst", step), self.fault_factor, 1.0)


@dataclass(frozen=True, slots=True)
class Variety:
    """How much the tasks differ in what is not a hyper-parameter of AdamW; see `Tasks` for each.

    Attributes:
        batches: drawn uniformly.
        init_scale: range, log-uniform.
        noisy: share of tasks with label noise.
        label_noise: range in those, uniform.
        faulty: share of tasks with a fault, of every kind alike.
        burst, jump: ranges of the faults' factors, log-uniform; a burst lasts one to three steps, a jump to the end.
        corrupted: fewest and most consecutive batches that are random tokens.
        dropout: range, uniform.
    """

    batches: tuple[float, ...] = (1.0,)
    init_scale: tuple[float, float] = (1.0, 1.0)
    noisy: float = 0.0
    label_noise: tuple[float, float] = (0.0, 0.3)
    faulty: float = 0.0
    burst: tuple[float, float] = (10.0, 1e3)
    corrupted: tuple[int, int] = (2, 10)
    jump: tuple[float, float] = (0.1, 100.0)
    dropout: tuple[float, float] = (0.05, 0.05)


PLAIN = Variety()
"""Sound runs at one batch size: what policies that set their scales themselves are trained on."""
WIDE = Variety(batches=(1.0, 0.5, 0.25, 0.125), init_scale=(0.5, 2.0), noisy=0.25, faulty=0.4, dropout=(0.0, 0.5))
"""Runs of several batch sizes and initial scales, of which two in five meet a fault; with `WIDE_LR_ERROR`."""
WIDE_LR_ERROR = (1e-3, 1e2)


def sample_tasks(
    rng: np.random.Generator,
    n: int,
    *,
    horizon: tuple[int, int] = (48, 128),
    multiple: int = 2,
    tuned_lr: float = TUNED_LR,
    lr_error: tuple[float, float] = LR_ERROR,
    well_tuned: float = WELL_TUNED,
    model: str = "llama",
    corpora: Sequence[str] = TRAINING_CORPORA,
    variety: Variety = PLAIN,
) -> Tasks:
    """Draws `n` tasks.

    Args:
        rng: the only source of randomness.
        n: number of tasks.
        horizon: shortest and longest run in optimizer steps; log-uniform between.
        multiple: horizons are rounded to multiples of this (the steps of one decision).
        tuned_lr: the learning rate that an error of 1 stands for.
        lr_error: range of the learning-rate error, log-uniform.
        well_tuned: share of tasks whose error is exactly 1.
        model: one of `MODELS`.
        corpora: of `CORPORA`; see `lbw_rl.envs.splits` for those that go together.
        variety: of everything else.
    """
    low, high = np.log(lr_error)
    error = np.where(rng.random(n) < well_tuned, 1.0, np.exp(rng.uniform(low, high, n)))
    steps = np.exp(rng.uniform(np.log(horizon[0]), np.log(horizon[1]), n))
    steps = np.maximum(1, np.rint(steps / multiple)).astype(np.int64) * multiple
    shares = np.array([_SHARES.get(name, 1.0) for name in corpora])
    return Tasks(
        seed=rng.integers(0, 2**62, n),
        model=np.full(n, MODELS.index(model)),
        lr=tuned_lr * error,
        lr_error=error,
        schedule=rng.integers(0, len(SCHEDULES), n),
        warmup=np.rint(rng.uniform(0.0, 0.1, n) * steps).astype(np.int64),
        beta1=rng.choice([0.85, 0.9, 0.95], n, p=[0.2, 0.6, 0.2]),
        beta2=rng.choice([0.95, 0.99, 0.999], n),
        weight_decay=rng.choice([0.0, 0.01, 0.1], n),
        clip=rng.choice([1.0, np.inf], n, p=[0.3, 0.7]),
        horizon=steps,
        corpus=rng.choice([CORPORA.index(name) for name in corpora], n, p=shares / shares.sum()),
        **_varied(rng.spawn(1)[0], steps, variety),  # a stream of its own: the rest does not depend on the variety
    )


def _varied(rng: np.random.Generator, horizon: IntArray, variety: Variety) -> dict[str, NDArray[Any]]:
    """The fields that `variety` decides."""
    n = len(horizon)

    def log_uniform(bounds: tuple[float, float]) -> FloatArray:
        low, high = np.log(bounds)
        return np.exp(rng.uniform(low, high, n))

    fault = np.where(rng.random(n) < variety.faulty, rng.integers(1, len(FAULTS), n), 0)
    start = np.rint(rng.uniform(0.1, 0.9, n) * horizon).astype(np.int64)
    lasts = (np.zeros(n), rng.integers(1, 4, n), rng.integers(*variety.corrupted, n, endpoint=True), horizon + 1)
    factors = (np.ones(n), log_uniform(variety.burst), np.ones(n), log_uniform(variety.jump))
    return {
        "batch": rng.choice(variety.batches, n),
        "init_scale": log_uniform(variety.init_scale),
        "label_noise": np.where(rng.random(n) < variety.noisy, rng.uniform(*variety.label_noise, n), 0.0),
        "fault": fault,
        "fault_start": start,
        "fault_end": start + np.choose(fault, lasts).astype(np.int64),
        "fault_factor": np.choose(fault, factors),
        "dropout": rng.uniform(*variety.dropout, n),
    }
