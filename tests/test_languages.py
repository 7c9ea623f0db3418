"""The languages of the proxies: each can be learned, each is what it says, none leaks what is held out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lbw_rl.envs.languages import (
    CORPORA,
    FEWEST_TOKENS,
    TRAINING_SHARE,
    draw_tokens,
    file_characters,
    python_docs,
    python_source,
)


@pytest.mark.parametrize("corpus", [c for c in CORPORA if c != "file"])
def test_languages_can_be_learned(corpus: str) -> None:
    """Their bigrams carry much less entropy than their single tokens, which carry less than uniform ones."""
    vocab = FEWEST_TOKENS if corpus == "python-source" else 64
    train, held_out = draw_tokens(corpus, np.random.default_rng(0), 2000, 4, 17, vocab)
    assert train.shape == (2000, 17)
    assert held_out.shape == (4, 17)
    assert 0 <= train.min() <= train.max() < vocab
    pairs = np.zeros((vocab, vocab))
    np.add.at(pairs, (train[:, :-1].ravel(), train[:, 1:].ravel()), 1.0)
    joint = pairs / pairs.sum()
    first = joint.sum(1)
    entropy = -(first[first > 0] * np.log(first[first > 0])).sum()
    conditional = -(joint[joint > 0] * np.log(joint[joint > 0])).sum() - entropy
    assert entropy < math.log(vocab) - 0.1
    assert conditional < entropy - 0.4
    same, _ = draw_tokens(corpus, np.random.default_rng(0), 2000, 4, 17, vocab)
    assert np.array_equal(train, same)


def test_brackets_nest() -> None:
    """Cut anywhere, a sequence closes only what is open, innermost first."""
    train, held_out = draw_tokens("brackets", np.random.default_rng(1), 300, 20, 33, 64)
    closings = 0
    for sequence in [*train, *held_out]:
        stack: list[int] = []
        for token in sequence:
            kind, closes = divmod(int(token), 2)
            if closes and stack:  # what was opened before the cut may close as well, once nothing newer is open
                assert stack.pop() == kind
                closings += 1
            elif not closes:
                stack.append(kind)
            assert len(stack) <= 6
    assert closings > 2000


def test_grammar_text_is_words_between_spaces_and_sentences() -> None:
    train, _ = draw_tokens("grammar", np.random.default_rng(2), 400, 4, 17, 64)
    text = train.ravel().tolist()
    words, word = set(), []
    for token in text[text.index(1) + 1 :]:
        if token > 1:
            word.append(token)
        elif token == 0:
            assert 1 <= len(word) <= 4
            words.add(tuple(word))
            word = []
        else:
            assert not word  # a sentence ends behind a word
    assert 10 < len(words) <= 6 * 12
    assert text.count(1) > 100


def test_two_tasks_speak_two_languages() -> None:
    for corpus in ("markov-1", "markov-2", "grammar", "brackets"):
        a, b = (draw_tokens(corpus, np.random.default_rng(seed), 500, 4, 17, 64)[0] for seed in (0, 1))
        shares = [np.bincount(x.ravel(), minlength=64) / x.size for x in (a, b)]
        assert np.abs(shares[0] - shares[1]).sum() > 0.3, corpus


def test_a_file_is_read_by_its_characters_and_its_end_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("ab" * 450 + "cd" * 50, encoding="utf-8")
    characters = file_characters(path, 8)
    assert set(characters[:900]) == {0, 1}
    assert set(characters[900:]) == {2, 3}
    train, held_out = draw_tokens("file", np.random.default_rng(0), 200, 30, 5, 8, path)
    assert set(train.ravel()) == {0, 1}
    assert set(held_out.ravel()) == {2, 3}


def test_no_file_and_a_short_one_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a" * 60, encoding="utf-8")
    for text, message in ((None, "needs the path"), (path, "60 characters; needed: more than 180")):
        with pytest.raises(ValueError, match=message):
            draw_tokens("file", np.random.default_rng(0), 4, 4, 17, 64, text)


def test_the_rarest_characters_share_the_last_token() -> None:
    few, many = python_docs(16), python_docs(64)
    assert few.max() == 15
    assert np.array_equal(few, np.minimum(many, 15))
    assert int(TRAINING_SHARE * len(many)) > 100_000


def test_python_source_is_read_in_tokens_and_refuses_a_vocabulary_of_characters() -> None:
    """A token stands for several characters on average, so that a text of 8 million of them is much shorter."""
    assert 1_000_000 < len(python_source(FEWEST_TOKENS)) < 6_000_000
    with pytest.raises(ValueError, match="vocab=64: 'python-source' is read in tokens; accepted: at least 512"):
        draw_tokens("python-source", np.random.default_rng(0), 2, 2, 17, 64)
