"""What the records of a family's runs tell, and of which runs they tell nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from lbw_rl.training_runs.results import Row
from lbw_rl.training_runs.run import LEDGER, METRICS
from lbw_rl.training_runs.stress.clock import held_out_curve, step_seconds, steps_to
from lbw_rl.training_runs.stress.conduct import interventions
from lbw_rl.training_runs.whole_record import lacking_lines


class Records:
    """Metrics and ledgers of runs; a file that lacks lines answers None.

    Attributes:
        lacking: the runs that left such files, see `lacking_lines`.

    Args:
        folder: that the rows' folders are relative to.
        rows: the runs.
    """

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        self._folder = folder
        self.lacking = lacking_lines(folder, rows)

    def steps_to(self, row: Row, target: float) -> float | None:
        """Steps until a run's held-out loss first was at `target`; inf if it never was."""
        if self._lacks(row, METRICS):
            return None
        return steps_to(held_out_curve(self._folder / row.folder / METRICS, row.initial_loss), target)

    def step_seconds(self, rows: Sequence[Row]) -> float | None:
        """Median over runs of the seconds of a step; None of runs without any. A few lost lines do it no harm."""
        times = [step_seconds(self._folder / row.folder / METRICS) for row in rows]
        known = [time for time in times if math.isfinite(time)]
        return median(known) if known else None

    def interventions(self, row: Row) -> tuple[int, int] | None:
        """Decisions beyond modulation and decisions in all, see `conduct.interventions`."""
        return None if self._lacks(row, LEDGER) else interventions(self._folder / row.folder / LEDGER)

    def _lacks(self, row: Row, file: str) -> bool:
        return file in self.lacking.get(row.folder, {})
