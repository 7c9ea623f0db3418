"""The distribution of training tasks that a proxy fleet is drawn from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

TUNED_LR = 1e-2
"""Best constant-error learning rate of the default proxy (`lbw_rl.training_runs.benchmarks.proxy_lr`)."""
LR_ERROR = (1e-2, 1e2)
"""Range of the learning-rate error: base peak LR / `TUNED_LR`, log-uniform."""
WELL_TUNED = 0.3
"""Share of tasks without any error, so that leaving alone is learned as well."""
SCHEDULES = ("constant", "cosine", "wsd", "linear")
CORPORA = ("markov-1", "markov-2", "python-docs")
_WSD_DECAY = 0.2


@dataclass(frozen=True, slots=True)
class Tasks:
    """n training tasks; every field has shape (n,).

    Attributes:
        seed: decides the task's language, data order and initial weights.
        lr: peak learning rate of the base run.
        lr_error: `lr` / `TUNED_LR`.
        schedule: index into `SCHEDULES`.
        warmup: steps of linear warmup.
        beta1: decay of AdamW's first moment.
        beta2: decay of AdamW's second moment.
        weight_decay: AdamW's decoupled decay.
        clip: largest gradient norm, `inf` for none.
        horizon: optimizer steps.
        corpus: index into `CORPORA`.
    """

    seed: IntArray
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

    def learning_rate(self, step: IntArray) -> FloatArray:
        """Scheduled learning rates.

        Args:
            step: optimizer steps done so far, shape (n,).

        Returns:
            Shape (n,); the shapes of `lbw_rl.envs.optim.schedule_multiplier`.
        """
        left = np.clip((self.horizon - step) / np.maximum(1, self.horizon - self.warmup), 0.0, 1.0)
        decay = np.clip((self.horizon - step) / np.maximum(1.0, _WSD_DECAY * self.horizon), 0.0, 1.0)
        shapes = (np.ones_like(left), 0.5 - 0.5 * np.cos(np.pi * left), decay, left)
        shape = np.choose(self.schedule, shapes)
        return self.lr * np.where(step < self.warmup, (step + 1) / np.maximum(1, self.warmup), shape)


def sample_tasks(
    rng: np.random.Generator,
    n: int,
    *,
    horizon: tuple[int, int] = (48, 128),
    multiple: int = 2,
    tuned_lr: float = TUNED_LR,
    lr_error: tuple[float, float] = LR_ERROR,
    well_tuned: float = WELL_TUNED,
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
    """
    low, high = np.log(lr_error)
    error = np.where(rng.random(n) < well_tuned, 1.0, np.exp(rng.uniform(low, high, n)))
    steps = np.exp(rng.uniform(np.log(horizon[0]), np.log(horizon[1]), n))
    steps = np.maximum(1, np.rint(steps / multiple)).astype(np.int64) * multiple
    return Tasks(
        seed=rng.integers(0, 2**62, n),
        lr=tuned_lr * error,
        lr_error=error,
        schedule=rng.integers(0, len(SCHEDULES), n),
        warmup=np.rint(rng.uniform(0.0, 0.1, n) * steps).astype(np.int64),
        beta1=rng.choice([0.85, 0.9, 0.95], n, p=[0.2, 0.6, 0.2]),
        beta2=rng.choice([0.95, 0.99, 0.999], n),
        weight_decay=rng.choice([0.0, 0.01, 0.1], n),
        clip=rng.choice([1.0, np.inf], n, p=[0.3, 0.7]),
        horizon=steps,
        corpus=rng.choice(len(CORPORA), n, p=[0.4, 0.3, 0.3]),
    )


def draw_tokens(
    corpus: int, rng: np.random.Generator, sequences: int, held_out: int, length: int, vocab: int
) -> tuple[IntArray, IntArray]:
    """Training and held-out sequences of one task.

    Args:
        corpus: index into `CORPORA`.
        rng: decides the language (for the Markov corpora) and which sequences are drawn from it.
        sequences: number of training sequences.
        held_out: number of held-out sequences.
        length: tokens per sequence.
        vocab: number of distinct tokens.

    Returns:
        int64 arrays of shape (sequences, length) and (held_out, length).
    """
    if CORPORA[corpus] == "python-docs":
        text = _python_docs(vocab)
        border = int(0.9 * len(text))
        starts = rng.integers(0, border - length, sequences), rng.integers(border, len(text) - length, held_out)
        train, test = (text[s[:, None] + np.arange(length)] for s in starts)
        return train, test
    both = _markov(rng, sequences + held_out, length, vocab, classes=1 if CORPORA[corpus] == "markov-1" else 4)
    return both[:sequences], both[sequences:]


def _markov(rng: np.random.Generator, sequences: int, length: int, vocab: int, classes: int) -> IntArray:
    """Sequences of a random sparse Markov language.

    The successor of token b depends on b and on the class of the token before it (one class: order 1). A
    context allows a handful of successors, drawn from one Zipf marginal over a shuffled vocabulary, so that the
    marginal, then the transitions, can be learned in tens of steps.
    """
    successors = int(rng.integers(3, 9))
    marginal = 1.0 / np.arange(1, vocab + 1) ** rng.uniform(0.7, 1.2)
    contexts = classes * vocab
    # Gumbel top-k draws distinct successors in proportion to the marginal.
    scores = np.log(marginal) + rng.gumbel(size=(contexts, vocab))
    table = rng.permutation(vocab)[np.argpartition(-scores, successors, axis=1)[:, :successors]]
    share = rng.dirichlet(np.full(successors, 0.7), contexts)
    cumulative = np.cumsum(share, axis=1)[:, :-1]
    class_of = rng.integers(0, classes, vocab)
    out = np.empty((sequences, length), dtype=np.int64)
    before, token = rng.integers(0, vocab, (2, sequences))
    for t in range(-2, length):  # two steps of burn-in leave the uniform start behind
        context = class_of[before] * vocab + token
        choice = (rng.random((sequences, 1)) > cumulative[context]).sum(axis=1)
        before, token = token, table[context, choice]
        if t >= 0:
            out[:, t] = token
    return out


@cache
def _python_docs(vocab: int) -> IntArray:
    """The characters of CPython's own reference text; the rarest share the last token."""
    from pydoc_data.topics import topics

    text = np.frombuffer("\n".join(topics[key] for key in sorted(topics)).encode("utf-32-le"), dtype=np.uint32)
    values, inverse, counts = np.unique(text, return_inverse=True, return_counts=True)
    rank = np.empty(len(values), dtype=np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(values))
    return np.minimum(rank, vocab - 1)[inverse.reshape(-1)]
