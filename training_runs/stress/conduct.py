"""What a governor did in a run, read off its ledger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lbw_rl.ledger import read_ledger
from lbw_rl.training_runs.health import ALARMS


def interventions(ledger: Path) -> tuple[int, int]:
    """Decisions beyond a law's normal modulation, and decisions in all.

    Beyond it is a decision that is not to proceed (a skip, a rollback), and one in a regime that is an alarm
    (`lbw_rl.training_runs.health.ALARMS`). On a healthy run each of them is a false one.

    Raises:
        ValueError: no ledger, or a damaged one.
    """
    decisions = list(_decisions(ledger))
    beyond = [d for d in decisions if d["executed"]["directive"] != "proceed" or d["regime"] in ALARMS]
    return len(beyond), len(decisions)


def mean_scale(ledgers: Sequence[Path], digits: int = 6) -> list[float]:
    """The executed learning-rate scale of several equally long runs, decision by decision: their geometric mean.

    A decision whose update was withheld has the scale of the one before it, or 1 at the start.

    Args:
        ledgers: one of each run.
        digits: significant digits that are kept: a replay needs no more, and its recipe stays readable.

    Raises:
        ValueError: no ledger, a damaged one, or runs of different lengths.
    """
    paths = [_scales(ledger) for ledger in ledgers]
    if len({len(path) for path in paths}) != 1:
        raise ValueError(
            f"replay: runs of {', '.join(str(len(p)) for p in paths)} decisions; accepted: of equal length"
        )
    mean = np.exp(np.log(np.asarray(paths)).mean(axis=0))
    return [float(f"{scale:.{digits}g}") for scale in mean]


def _scales(ledger: Path) -> list[float]:
    scales: list[float] = []
    for decision in _decisions(ledger):
        executed = decision["executed"]
        applied = executed["directive"] == "proceed" and executed["lr_scale"] > 0
        scales.append(executed["lr_scale"] if applied else scales[-1] if scales else 1.0)
    return scales


def _decisions(ledger: Path) -> list[dict[str, Any]]:
    return [record for record in read_ledger(ledger) if record["type"] == "decision"]
