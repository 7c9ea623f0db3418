"""What every rank has to know of every other besides measurements."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbw_rl.stages import MODES, Mode

_NO_WISH = float(len(MODES))


def cast(wish: Mode | None, digest: str, restorable: bool) -> NDArray[np.float32]:
    """One rank's vote: the mode it was asked for, the digest of its decisions so far, whether it can roll back.

    The 48 bits of the digest go into two float32, which hold integers below 2²⁴ exactly.
    """
    bits = int(digest, 16)
    index = float(MODES.index(wish)) if wish is not None else _NO_WISH
    return np.array([index, bits >> 24, bits & 0xFFFFFF, restorable], np.float32)


def count(votes: NDArray[Any]) -> tuple[Mode | None, bool, bool]:
    """What the ranks agree on.

    Args:
        votes: one row per rank.

    Returns:
        The mode of least authority that any rank was asked for (None: no rank was), whether all have decided alike so
        far, and whether all can roll back.
    """
    wish = float(votes[:, 0].min())
    alike = not (votes[:, 1:3] != votes[0, 1:3]).any()
    return None if wish == _NO_WISH else MODES[int(wish)], alike, bool(votes[:, 3].all())
