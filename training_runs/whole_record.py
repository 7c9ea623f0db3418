"""Whether the record of a run is whole. A full disk takes lines of it and spares the run, so what is read off it must know."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from lbw_rl.ledger import read_ledger
from lbw_rl.training_runs.folders import read_jsonl
from lbw_rl.training_runs.results import Row
from lbw_rl.training_runs.summary import UNGOVERNED

log = logging.getLogger("lbw_rl")

Lacking = Mapping[str, Mapping[str, str]]
"""Folder of a run → file of its record → how much of it is there: `{"runs/a": {"metrics.jsonl": "12 of 40 lines"}}`."""


def lacking_lines(out: Path, rows: Iterable[Row]) -> dict[str, dict[str, str]]:
    """The runs whose records lack lines, as `Lacking`; empty if all are whole.

    A record is whole with a line of metrics for every step and, of a governed run, a decision in the ledger for every one that
    the run counted (one at least, where a run of an earlier version did not say).

    Args:
        out: what the rows' folders are relative to.
        rows: the runs.
    """
    from lbw_rl.training_runs.run import LEDGER, METRICS  # torch, which a report does without

    found = {}
    for folder, row in {row.folder: row for row in rows}.items():
        written = {METRICS: (sum(1 for _ in read_jsonl(out / folder / METRICS)), row.steps, "lines")}
        if row.controller not in UNGOVERNED:
            written[LEDGER] = (_decisions(out / folder / LEDGER), max(1, row.decisions), "decisions")
        lacking = {name: f"{there} of {all} {what}" for name, (there, all, what) in written.items() if there < all}
        if lacking:
            found[folder] = lacking
    return found


def in_words(lacking: Lacking, most: int = 5) -> str:
    """`runs/a (metrics.jsonl 12 of 40 lines), runs/b (ledger.jsonl 0 of 40 decisions) and 3 more`."""
    runs = [f"{folder} ({', '.join(' '.join(part) for part in files.items())})" for folder, files in lacking.items()]
    return ", ".join(runs[:most]) + (f" and {len(runs) - most} more" if len(runs) > most else "")


def tell_of_lacking_lines(lacking: Lacking) -> None:
    """Warns of incomplete records, once for all of them; says nothing where there is none."""
    if lacking:
        message = (
            "%d run%s left incomplete records, as a full disk makes them, and figures read off them leave them out: %s"
        )
        log.warning(message, len(lacking), "s" * (len(lacking) > 1), in_words(lacking))


def _decisions(ledger: Path) -> int:
    try:
        return sum(record["type"] == "decision" for record in read_ledger(ledger))
    except ValueError:  # missing or damaged: nothing can be read off it
        return 0
