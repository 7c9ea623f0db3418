"""The languages that proxies learn: synthetic ones, drawn anew for every task, and texts, as characters or tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

CORPORA = ("markov-1", "markov-2", "python-docs", "file", "grammar", "brackets", "python-source")
FEWEST_TOKENS = 512
"""Vocabulary that "python-source" takes at least: below it a byte-pair encoding is little more than bytes."""
TRAINING_SHARE = 0.9
"""Of a text, from its beginning; the rest is held out."""


def draw_tokens(
    corpus: str,
    rng: np.random.Generator,
    sequences: int,
    held_out: int,
    length: int,
    vocab: int,
    text: Path | None = None,
) -> tuple[IntArray, IntArray]:
    """Training and held-out sequences of one task.

    Args:
        corpus: one of `CORPORA`.
        rng: decides the language (for the synthetic corpora) and which sequences are drawn from it.
        sequences: number of training sequences.
        held_out: number of held-out sequences.
        length: tokens per sequence.
        vocab: number of distinct tokens.
        text: the UTF-8 file that the corpus "file" reads.

    Returns:
        int64 arrays of shape (sequences, length) and (held_out, length).

    Raises:
        ValueError: "file" without a text, or with one too short to hold a sequence out; "python-source" with too small a
            vocabulary.
        ModuleNotFoundError: "python-source" without the extra `lbw-rl[hf]`.
    """
    if (whole := _text(corpus, vocab, text)) is not None:
        border = int(TRAINING_SHARE * len(whole))
        if len(whole) - border <= length:
            raise ValueError(f"text={text}: {len(whole)} characters; needed: more than {10 * length + 10}")
        starts = rng.integers(0, border - length, sequences), rng.integers(border, len(whole) - length, held_out)
        train, test = (whole[s[:, None] + np.arange(length)] for s in starts)
        return train, test
    total = sequences + held_out
    if corpus == "grammar":
        both = _grammar(rng, total, length, vocab)
    elif corpus == "brackets":
        both = _brackets(rng, total, length, vocab)
    else:
        both = _markov(rng, total, length, vocab, classes=1 if corpus == "markov-1" else 4)
    return both[:sequences], both[sequences:]


def _text(corpus: str, vocab: int, text: Path | None) -> IntArray | None:
    """The whole of a corpus that is a text; None for a language that is drawn."""
    if corpus == "python-docs":
        return python_docs(vocab)
    if corpus == "file":
        return file_characters(text, vocab)
    return python_source(vocab) if corpus == "python-source" else None


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


def _grammar(rng: np.random.Generator, sequences: int, length: int, vocab: int) -> IntArray:
    """Sequences cut from the text of a random phrase-structure grammar.

    A sentence is one of a few patterns of word classes, a word a string of one to four tokens from its class's
    lexicon; token 0 ends a word and token 1 a sentence. Within a word the text is near certain, between words it
    depends on the pattern, which takes a longer memory than the Markov languages do.
    """
    classes, words, longest = 6, 12, 4
    patterns = [rng.integers(0, classes, rng.integers(3, 7)) for _ in range(5)]
    letters = rng.integers(2, vocab, (classes, words, longest))
    sizes = rng.integers(1, longest + 1, (classes, words))
    frequency = 1.0 / np.arange(1, words + 1)
    frequency /= frequency.sum()
    needed = sequences * length
    text = np.empty(0, dtype=np.int64)
    while len(text) < needed:
        of_class = np.concatenate([[*patterns[i], -1] for i in rng.integers(0, len(patterns), 1 + needed // 16)])
        word = rng.choice(words, len(of_class), p=frequency)
        # Every word is a row of fixed width, with its end behind it; what lies beyond is cut away.
        rows = np.concatenate([letters[of_class, word], np.zeros((len(word), 1), dtype=np.int64)], axis=1)
        size = np.where(of_class < 0, 0, sizes[of_class, word])
        rows[np.arange(len(rows)), size] = of_class < 0
        text = np.concatenate([text, rows[np.arange(longest + 1) <= size[:, None]]])
    return text[:needed].reshape(sequences, length)


def _brackets(rng: np.random.Generator, sequences: int, length: int, vocab: int) -> IntArray:
    """Sequences of nested brackets: token 2k opens kind k, 2k + 1 closes it, and only the innermost may close.

    Kinds follow a Zipf law over a shuffled order, so that there is something to learn before nesting is.
    """
    deepest = 6
    kinds = vocab // 2
    share = 1.0 / np.arange(1, kinds + 1) ** rng.uniform(0.7, 1.2)
    opened = rng.choice(rng.permutation(kinds), (length + deepest, sequences), p=share / share.sum())
    opens = rng.random((length + deepest, sequences)) < rng.uniform(0.4, 0.6)
    stack, depth, every = np.zeros((deepest, sequences), dtype=np.int64), np.zeros(sequences, int), np.arange(sequences)
    out = np.empty((sequences, length), dtype=np.int64)
    for t in range(-deepest, length):  # a few steps of burn-in leave the empty start behind
        up = (opens[t + deepest] | (depth == 0)) & (depth < deepest)
        kind = np.where(up, opened[t + deepest], stack[depth - 1, every])
        stack[np.where(up, depth, depth - 1), every] = kind
        depth += np.where(up, 1, -1)
        if t >= 0:
            out[:, t] = 2 * kind + ~up
    return out


@cache
def python_docs(vocab: int) -> IntArray:
    """The characters of CPython's own reference text, as `_ranks` counts them."""
    from pydoc_data.topics import topics

    return _ranks("\n".join(topics[key] for key in sorted(topics)), vocab)


@cache
def python_source(vocab: int) -> IntArray:
    """The sources of CPython's standard library in the tokens of a byte-pair encoding: what real runs read.

    Raises:
        ValueError: a vocabulary below `FEWEST_TOKENS`.
        ModuleNotFoundError: without the extra `lbw-rl[hf]`.
    """
    if vocab < FEWEST_TOKENS:
        raise ValueError(f"vocab={vocab}: 'python-source' is read in tokens; accepted: at least {FEWEST_TOKENS}")
    from lbw_rl.envs.corpus import load_corpus
    from lbw_rl.envs.specs import DataSpec

    corpus = load_corpus(DataSpec(corpus="python-source", vocab_size=vocab))
    return np.concatenate([corpus.train.numpy(), corpus.held_out.numpy()])


@cache
def file_characters(text: Path | None, vocab: int) -> IntArray:
    """The characters of a UTF-8 file, as `_ranks` counts them.

    Raises:
        ValueError: no file.
    """
    if text is None:
        raise ValueError("text=None: the corpus 'file' needs the path of a UTF-8 text file")
    return _ranks(text.read_text(encoding="utf-8"), vocab)


def _ranks(text: str, vocab: int) -> IntArray:
    """Each character's rank by frequency; the rarest share the last token."""
    values, inverse, counts = np.unique(
        np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32), return_inverse=True, return_counts=True
    )
    rank = np.empty(len(values), dtype=np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(values))
    return np.minimum(rank, vocab - 1)[inverse.reshape(-1)]
