"""Optional packages, imported only where a run needs them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def hf_package(name: str, purpose: str) -> Any:
    """Imports one of the packages of the extra `lbw-rl[hf]`.

    Args:
        name: module to import, for example `"transformers"`.
        purpose: what it is needed for, for the error message.

    Raises:
        ModuleNotFoundError: it is not installed; one line that names the extra.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # installed, but broken: the cause must not hide behind our advice
            raise
        raise ModuleNotFoundError(f"{purpose} needs {name}: pip install 'lbw-rl[hf]'", name=name) from error


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Keeps the progress bars of transformers and datasets, where imported, out of pipes and log files."""
    undo = []
    if not sys.stderr.isatty():
        transformers, datasets = sys.modules.get("transformers"), sys.modules.get("datasets")
        if transformers and transformers.utils.logging.is_progress_bar_enabled():
            transformers.utils.logging.disable_progress_bar()
            undo.append(transformers.utils.logging.enable_progress_bar)
        if datasets and not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            undo.append(datasets.enable_progress_bars)
    try:
        yield
    finally:
        for enable in undo:
            enable()
