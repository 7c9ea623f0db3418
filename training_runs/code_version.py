"""Which version of this package made a run: figures of several versions in one table are told apart by it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import lbw_rl

if TYPE_CHECKING:
    from lbw_rl.training_runs.results import Row

log = logging.getLogger("lbw_rl")

UNRECORDED = "unrecorded"
"""Stands for the version of runs that were made before versions were written down."""

_DECISIVE = ("*.py", "controllers/*.py", "controllers/pretrained/*/policy.*", "envs/*.py", "training_runs/run.py")


@cache
def code_version() -> str:
    """The package's version and eight hex digits over the sources that decide a run, `0.2.0+1f3c9a2b`.

    Those are governance, controllers with their frozen policies, environments, and the run itself; not the command line,
    the reports and the suites, which start runs and read them. Of a process, it is that of its first call.
    """
    return f"{lbw_rl.__version__}+{_digest(Path(lbw_rl.__file__).parent)}"


def _digest(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _DECISIVE for path in root.glob(pattern)):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)} ".encode() + content)
    return digest.hexdigest()[:8]


def runs_by_code(rows: Iterable[Row]) -> dict[str, int]:
    """Version of the code → how many runs it made, the most first; rows that share a run's folder are one run."""
    made = {row.folder or str(i): row.code or UNRECORDED for i, row in enumerate(rows)}
    return dict(Counter(made.values()).most_common())


def in_words(runs: dict[str, int]) -> str:
    """`0.2.0+1f3c9a2b`, or `0.2.0+1f3c9a2b: 30 runs, unrecorded: 1 run`."""
    if len(runs) == 1:
        return next(iter(runs))
    return ", ".join(f"{code}: {count} run{'s' * (count != 1)}" for code, count in runs.items())


def tell_of_other_code(folder: Path, summary: str) -> None:
    """Warns of finished runs that another version of the code left, which a resumed grid takes as they are.

    Args:
        folder: of the grid; its runs are at any depth.
        summary: name of the file that a finished run has.
    """
    found = Counter(_code_of(path) for path in folder.rglob(summary))
    others = {code: count for code, count in found.most_common() if code != code_version()}
    if others:
        log.warning(
            "%d of the %d finished runs in %s are of another version of the code (%s; now %s) and are used as they are: "
            "to run everything with one version, use a new --out",
            sum(others.values()),
            found.total(),
            folder,
            ", ".join(f"{code}: {count}" for code, count in others.items()),
            code_version(),
        )


def _code_of(summary: Path) -> str:
    try:
        return str(json.loads(summary.read_text(encoding="utf-8")).get("code", UNRECORDED))
    except (OSError, ValueError, AttributeError):  # damaged: who resumes the run says so
        return UNRECORDED
