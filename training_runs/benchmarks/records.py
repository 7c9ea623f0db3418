"""What the benchmarks share: the machine that they ran on, rows that outlive an interruption, intervals."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from lbw_rl.training_runs.folders import read_jsonl
from lbw_rl.training_runs.workers import executor

VERSIONS = ("lbw-rl", "torch", "transformers", "numpy")
_RESAMPLES = 9999


def machine(threads: int) -> dict[str, Any]:
    """Processor, cores, threads, versions and date, for the record."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "torch_threads": threads,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def fingerprint(settings: Any) -> str:
    """Key of one row: equal settings and versions, equal key."""
    described = {"settings": settings, "versions": {name: version(name) for name in VERSIONS}}
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Rows:
    """Finished rows in a JSONL file, each under the key of its settings.

    Args:
        path: the file, which is made; rows that an earlier, interrupted benchmark left there count as done.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rows = {row["key"]: row for row in read_jsonl(path)}
        temporary = path.with_name(path.name + ".tmp")  # without a line that a kill tore: the next one would join it
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self._rows.values()), encoding="utf-8")
        os.replace(temporary, path)

    def get(self, key: str) -> dict[str, Any] | None:
        """The finished row of that key, if there is one."""
        return self._rows.get(key)

    def add(self, key: str, row: dict[str, Any]) -> dict[str, Any]:
        """Files a row; a kill after this does not lose it."""
        line = json.dumps({"key": key, **row})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._rows[key] = json.loads(line)  # as a resumed benchmark will read it
        return self._rows[key]


class Cell(Protocol):
    """One run of a benchmark; picklable, for it goes to another process."""

    @property
    def key(self) -> str:
        """What identifies its row."""
        ...

    def __str__(self) -> str:
        """What progress calls it."""
        ...


C = TypeVar("C", bound=Cell)


def run_missing(
    cells: Sequence[C],
    run: Callable[[C], dict[str, Any]],
    rows: Rows,
    *,
    workers: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[dict[str, Any]]:
    """Runs the cells that have no row yet, each in a process with one torch thread.

    Args:
        cells: in the order of the benchmark.
        run: a module's function, cell → row.
        rows: where finished ones are, and go.
        workers: processes.
        progress: told (cells finished, cells in all, the latest).

    Returns:
        The rows of all cells, in their order.
    """
    missing = [cell for cell in cells if rows.get(cell.key) is None]
    if missing:
        with executor("local", min(workers, len(missing))) as submit:
            pending = {submit(run, cell): cell for cell in missing}
            for done, future in enumerate(as_completed(pending), len(cells) - len(missing) + 1):
                cell = pending[future]
                rows.add(cell.key, future.result())
                if progress is not None:
                    progress(done, len(cells), str(cell))
    return [row for cell in cells if (row := rows.get(cell.key)) is not None]


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the median (fixed seed); `None` of fewer than two values."""
    if len(values) < 2:
        return None
    sample = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(np.asarray(values, dtype=np.float64)[sample], axis=1), [2.5, 97.5])
    return float(low), float(high)


def refuse_faults(summary: Mapping[str, Any]) -> None:
    """Refuses a run whose governance failed: it went on ungoverned, so its figures would be of something else.

    Raises:
        RuntimeError: `summary`, the governor's, counts a fault or says that the controller is suspended.
    """
    if summary["faults"] or summary["suspended"]:
        raise RuntimeError(f"governance failed during the benchmark: faults {dict(summary['faults'])}")


def choose(text: str, accepted: Sequence[str], what: str) -> list[str]:
    """The comma-separated names in `text`.

    Raises:
        ValueError: a name that is not accepted; one line that names those that are.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in accepted:
            raise ValueError(f"{what}: {name!r} is unknown; accepted: {', '.join(accepted)}")
    return list(dict.fromkeys(names))
