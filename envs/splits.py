"""Which tasks a policy may be trained on, chosen by, and judged on: disjoint by construction.

A task's split is a function of its fields: the latest split that its model or its corpus is reserved for. Training
tasks hold nothing that is reserved; validation tasks hold a Qwen2-style model or grammar text, and nothing that is
reserved for the test; test tasks hold adapters on a pretrained model or brackets, which nothing before has seen.
A quadratic reads no corpus, so that it makes training tasks alone.
"""

from __future__ import annotations

import numpy as np

from lbw_rl.envs.languages import CORPORA
from lbw_rl.envs.tasks import MODELS, IntArray, Tasks

SPLITS = ("train", "validation", "test")

_RESERVED = {"qwen2": 1, "grammar": 1, "lora": 2, "brackets": 2}
"""Model or corpus → index of the first split that may hold it; 0 for the others."""


def split(tasks: Tasks) -> IntArray:
    """Index into `SPLITS` of each task, shape (n,)."""
    models = np.array([_RESERVED.get(name, 0) for name in MODELS])
    corpora = np.array([_RESERVED.get(name, 0) for name in CORPORA])
    return np.maximum(models[tasks.model], corpora[tasks.corpus])


def corpora_of(model: str, name: str, *, text: bool = False, tokens: bool = False) -> tuple[str, ...]:
    """The corpora with which a model makes tasks of one split.

    Args:
        model: one of `lbw_rl.envs.tasks.MODELS`.
        name: one of `SPLITS`.
        text: whether there is a file for the corpus "file" to read.
        tokens: whether the vocabulary is large enough for "python-source".

    Raises:
        ValueError: no such split, or none for this model.
    """
    if name not in SPLITS:
        raise ValueError(f"split={name!r} is unknown; accepted: {', '.join(SPLITS)}")
    wanted, first = SPLITS.index(name), _RESERVED.get(model, 0)
    accepted = SPLITS[first:] if model != "quadratic" else SPLITS[:1]
    if name not in accepted:
        raise ValueError(f"split={name!r}: there are no such tasks of {model}; accepted: {', '.join(accepted)}")
    had = {"file": text, "python-source": tokens}
    return tuple(c for c in CORPORA if max(first, _RESERVED.get(c, 0)) == wanted and had.get(c, True))
