"""A per-user cache of tokenised corpora, for those that take more than seconds to tokenise."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

Tokens = tuple[np.ndarray, np.ndarray, str]
"""Training ids and held-out ids, int32, shapes (n,) and (m,), and the tokenizer's JSON."""


def cache_folder() -> Path:
    """`$LBW_RL_CACHE`, else `lbw-rl` under `$XDG_CACHE_HOME`, else `~/.cache/lbw-rl`."""
    if chosen := os.environ.get("LBW_RL_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lbw-rl"


def cached_tokens(key: str, make: Callable[[], Tokens]) -> Tokens:
    """What `make` returned under this key before, else what it returns now.

    Args:
        key: file-name-safe digest of everything that the tokens depend on.
        make: tokenises the corpus.
    """
    path = cache_folder() / "tokens" / f"{key}.safetensors"
    try:
        with safe_open(path, framework="np") as file:
            return file.get_tensor("train"), file.get_tensor("held_out"), file.metadata()["tokenizer"]
    except (OSError, SafetensorError, KeyError, TypeError):
        pass  # absent or damaged: made anew and replaced
    tokens = make()
    with contextlib.suppress(OSError):  # a read-only home or a full disk costs time, not the run
        _write(path, tokens)
    return tokens


def _write(path: Path, tokens: Tokens) -> None:
    # Through a temporary file and a rename: parallel runs and kills never leave half a file under the name.
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        train, held_out, tokenizer = tokens
        save_file({"train": train, "held_out": held_out}, temporary, metadata={"tokenizer": tokenizer})
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
