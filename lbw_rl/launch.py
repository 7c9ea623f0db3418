"""What torchrun, or a launcher that sets its variables, tells a process about the others it was started with."""

from __future__ import annotations

import os
from datetime import timedelta

_SAID = "lbw-rl: the first rank's last words"
_PATIENCE = 20.0  # seconds; ranks that fail alike fail at about the same time


def world_size() -> int:
    """How many processes train together (`WORLD_SIZE`), 1 without a launcher.

    Raises:
        ValueError: the variable holds no count.
    """
    return max(1, _count("WORLD_SIZE", 1))


def rank() -> int:
    """This process' number among them (`RANK`)."""
    return _count("RANK", 0)


def local_rank() -> int:
    """Its number among those of the same machine (`LOCAL_RANK`)."""
    return _count("LOCAL_RANK", rank())


def wording(message: str) -> str | None:
    """How this process should print a message that all ranks may have: the first one as it is, others if theirs differs.

    The others wait for the first one's, since a launcher ends all processes as soon as one of them has ended. Call
    `said` when it is printed.

    Returns:
        The line, with the number of a rank that has something of its own to say; None where all is said.
    """
    try:
        if world_size() == 1 or rank() == 0:
            return message
        store = _store()
        store.wait([_SAID], timedelta(seconds=_PATIENCE))
        if store.get(_SAID).decode() == message:
            return None
    except Exception:  # the first rank says nothing, or is gone: torch raises whatever the network does
        pass
    number = os.environ.get("RANK", "")
    return f"rank {number}: {message}" if number.isdecimal() and int(number) else message


def said(message: str) -> None:
    """Tells the other ranks that the first one has printed a message."""
    try:
        if world_size() > 1 and rank() == 0:
            _store().set(_SAID, message)
    except Exception:  # nobody to tell
        return


def _count(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    if text and not text.isdecimal():
        raise ValueError(f"{variable}: {text!r} is no number; accepted: what torchrun sets, or the variable unset")
    return int(text) if text else default


def _store():  # type: ignore[no-untyped-def]  # a torch.distributed.Store; torch takes seconds to import
    from torch.distributed import rendezvous

    return next(iter(rendezvous("env://", timeout=timedelta(seconds=_PATIENCE))))[0]
