"""Text to token tensors: tokenizer, train and held-out splits, and batches that depend on the step alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lbw_rl.envs.extras import hf_package
from lbw_rl.envs.recipe import DataSpec
from lbw_rl.envs.recipe_models import model_folder
from lbw_rl.envs.text import CorpusError, Text, file_stamp, load_text
from lbw_rl.envs.token_cache import cached_tokens

__all__ = ["Batches", "Corpus", "CorpusError", "held_out_windows", "load_corpus"]

_CHUNK = 1 << 16  # characters handed to the tokenizer at once, cut at line ends
_CHUNKS_AT_ONCE = 64  # bounds the memory of the encodings, which are far larger than their ids
_BPE_TEXT = 20_000_000  # characters that the BPE learns from: its merges settle long before
_CACHE_ABOVE = 2_000_000  # characters past which tokenising takes seconds and is worth a file


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenised corpus. Shared between the runs of a process: its tensors must not be written to.

    Attributes:
        train: token ids, int64, shape (n,).
        held_out: token ids, int64, shape (m,).
        vocab_size: entries of the tokenizer; every id is below it.
        sha256: hex digest of the text, see `lbw_rl.envs.text.Text`.
        tokenizer: the `tokenizers.Tokenizer` that made the ids.
    """

    train: torch.Tensor
    held_out: torch.Tensor
    vocab_size: int
    sha256: str
    tokenizer: Any


def load_corpus(data: DataSpec, model_path: str | None = None) -> Corpus:
    """Reads, tokenises and splits the corpus that `data` names. The last few are kept in memory.

    Args:
        data: the recipe's `[data]` section.
        model_path: local folder, hub id or recipe whose tokenizer `data.tokenizer = "model"` uses.

    Raises:
        RecipeError, ModelError: see `model_folder`.
        CorpusError: see `load_text`; or no usable tokenizer, or fewer tokens than one sequence in a split.
        ModuleNotFoundError: without the extra `lbw-rl[hf]`.
    """
    base = model_folder(model_path) if data.tokenizer == "model" and model_path is not None else None
    corpus = _load(data, base, file_stamp(data))
    for part, tokens in (("training", corpus.train), ("held-out", corpus.held_out)):
        if len(tokens) < data.sequence_length:
            raise CorpusError(
                f"data.corpus: {data.corpus!r} gives {len(tokens)} {part} tokens; accepted: at least "
                f"data.sequence_length = {data.sequence_length} in the training and in the held-out part"
            )
    return corpus


@lru_cache(maxsize=4)
def _load(data: DataSpec, model_path: str | None, stamp: tuple[int, int] | None) -> Corpus:
    text = load_text(data)
    tokenizers = hf_package("tokenizers", "tokenising a corpus")
    tokenizer = None if model_path is None else _model_tokenizer(tokenizers, model_path)

    def make() -> tuple[np.ndarray, np.ndarray, str]:
        made = _train_bpe(tokenizers, text.train, data.vocab_size) if tokenizer is None else tokenizer
        return _encode(made, text.train), _encode(made, text.held_out), made.to_str()

    if len(text.train) + len(text.held_out) > _CACHE_ABOVE:
        identity = f"bpe-{data.vocab_size}" if tokenizer is None else tokenizer.to_str()
        train, held_out, serialised = cached_tokens(_key(text, identity, tokenizers.__version__), make)
    else:
        train, held_out, serialised = make()
    tokenizer = tokenizers.Tokenizer.from_str(serialised)
    return Corpus(
        train=torch.from_numpy(train.astype(np.int64)),
        held_out=torch.from_numpy(held_out.astype(np.int64)),
        vocab_size=tokenizer.get_vocab_size(),
        sha256=text.sha256,
        tokenizer=tokenizer,
    )


def _key(text: Text, identity: str, version: str) -> str:
    parts = (text.sha256, str(len(text.train)), identity, version, str(_CHUNK), str(_BPE_TEXT))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _chunks(text: str) -> Iterator[str]:
    """Pieces of about `_CHUNK` characters, whole lines where lines are shorter than that."""
    start = 0
    while start < len(text):
        end = start + _CHUNK
        newline = text.rfind("\n", start, end)
        if end < len(text) and newline > start:
            end = newline + 1
        yield text[start:end]
        start = end


def _train_bpe(tokenizers: Any, text: str, vocab_size: int) -> Any:
    """A byte-level BPE as GPT-2's (Radford et al. 2019): no unknown token, any text can be encoded."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_chunks(text[:_BPE_TEXT]), trainer)
    return tokenizer


def _model_tokenizer(tokenizers: Any, model_path: str) -> Any:
    # tokenizer.json as it is: loading it through transformers may rebuild parts of it from the model's type.
    folder = Path(model_path).expanduser()
    try:
        if folder.is_dir():
            tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            tokenizer = tokenizers.Tokenizer.from_pretrained(model_path)
    except Exception as error:  # the bindings raise bare Exception
        reason = " ".join(str(error).split())[:200]
        raise CorpusError(
            f"data.tokenizer: 'model' finds no tokenizer.json in model.path {model_path!r} ({reason}); "
            "accepted: a folder or hub id that has one, or data.tokenizer = 'bpe'"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encode(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids of `text` without special tokens, int32, shape (n,)."""
    parts: list[np.ndarray] = []
    for group in _groups(_chunks(text), _CHUNKS_AT_ONCE):
        encodings = tokenizer.encode_batch_fast(group, add_special_tokens=False)
        parts.extend(np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings)
    return np.concatenate(parts)


def _groups(items: Iterable[str], size: int) -> Iterator[list[str]]:
    group: list[str] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


class Batches:
    """Random windows of a token stream, a pure function of (seed, step, micro-batch).

    Holds no position, so that a resumed or rolled-back run reads what the uninterrupted one would have read
    and nothing about the data needs a checkpoint.
    """

    def __init__(self, tokens: torch.Tensor, sequence_length: int, batch_size: int, seed: int) -> None:
        self._windows = tokens.unfold(0, sequence_length, 1)
        self._batch_size = batch_size
        self._seed = seed

    def __call__(self, step: int, micro: int = 0) -> torch.Tensor:
        """Token ids, int64, shape (batch_size, sequence_length), of micro-batch `micro` of step `step`."""
        # Hashed rather than added up: neighbouring seeds, steps and micro-batches must share no stream.
        digest = hashlib.blake2b(f"{self._seed}/{step}/{micro}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        starts = torch.randint(len(self._windows), (self._batch_size,), generator=generator)
        return self._windows[starts]


def held_out_windows(tokens: torch.Tensor, sequence_length: int, limit: int) -> torch.Tensor:
    """Fixed, non-overlapping windows, shape (at most `limit`, sequence_length), spread evenly over the text."""
    count = len(tokens) // sequence_length
    windows = tokens[: count * sequence_length].view(count, sequence_length)
    if count <= limit:
        return windows
    return windows[torch.arange(limit) * count // limit]
