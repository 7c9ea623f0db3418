"""One command's work: tune the baseline, run the grid, replay the governor blind, put the figures together."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lbw_rl.training_runs.code_version import in_words, runs_by_code, tell_of_other_code
from lbw_rl.training_runs.folders import prepare_output, write_json
from lbw_rl.training_runs.grid import Cell, Submit, grid_workers, record_of_corpus, record_of_machine, run_cells
from lbw_rl.training_runs.results import Results, Row, summarise, write_results
from lbw_rl.training_runs.run import LEDGER, SUMMARY
from lbw_rl.training_runs.stress.conduct import mean_scale
from lbw_rl.training_runs.stress.measures import measure
from lbw_rl.training_runs.stress.plan import PLAN, Plan, Setting
from lbw_rl.training_runs.stress.source import source_table
from lbw_rl.training_runs.stress.suite import ADAMW, GUARD, MULTIPLIERS, TUNED, Family
from lbw_rl.training_runs.stress.targets import judge_targets
from lbw_rl.training_runs.stress.tuning import Tuning
from lbw_rl.training_runs.whole_record import lacking_lines, tell_of_lacking_lines
from lbw_rl.training_runs.workers import Backend

log = logging.getLogger("lbw_rl")

STRESS, TUNING = "stress.json", "tuning.json"


class Meter(Protocol):
    """Shows progress."""

    def update(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total`, with a short note."""


Meters = Callable[[str], AbstractContextManager[Meter]]
"""label → a progress meter for the length of a block."""

Run = Callable[[Sequence[Cell], Meter], dict[str, Row]]
"""Runs cells; the row of each cell's folder."""


def stress(
    plan: Plan,
    out: str | Path,
    meters: Meters,
    *,
    resume: bool = False,
    backend: Backend = "local",
    workers: int | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Runs a suite and writes what it found.

    Three stages: the baseline is tuned (`tuning.json`), the grid is run, and so are the controls that replay a governor's
    scales. Then `results.json`, `results.parquet` and, last, `stress.json` are written. The folder of a run follows from
    its settings, so every stage, a larger budget and another family find what any earlier command finished in the same folder.

    Args:
        plan: what to run.
        out: output folder.
        meters: shows progress.
        resume: go on in a folder that a command with the same suite and settings left.
        backend: "local" processes, or "ray" for a cluster that shares `out`.
        workers: local processes; default: the suite's, or one per core.
        command: the command line, for the record.

    Returns:
        The content of `stress.json`.

    Raises:
        ValueError: an output folder in use or of another suite, or a run whose settings cannot be used.
    """
    folder = prepare_output(out, resume).resolve()
    plan.keep(folder)
    tell_of_other_code(folder, SUMMARY)

    try:
        with grid_workers(folder, backend, workers or plan.suite.workers) as submit:
            rows, tuned = _run_stages(plan, folder, meters, submit)
    except ValueError:
        if not (folder / "runs").exists():  # nothing was finished: the corrected command finds an empty folder
            (folder / PLAN).unlink()
        raise
    return _findings(plan, folder, rows, tuned, command or " ".join(sys.argv[:1]))


def _run_stages(plan: Plan, folder: Path, meters: Meters, submit: Submit) -> tuple[list[Row], dict[str, Any]]:
    """The rows of grid and replays, and what the search found in each family."""

    def run(cells: Sequence[Cell], meter: Meter) -> dict[str, Row]:
        return run_cells(cells, folder, submit, lambda done, total, row: meter.update(done, total, _note(row)))

    tuned: dict[str, Any] = {}
    if plan.budget.search is not None:
        with meters("1/3 tuning AdamW") as meter:
            tuned = _tune(plan, run, meter)
        write_json(folder / TUNING, tuned)
    settings = {name: Setting(found["lr"], found["schedule"]) for name, found in tuned.items()}
    cells = _seed_first(cell for f in plan.families for cell in plan.grid(f, settings.get(f.name)))
    with meters("2/3 grid") as meter:
        rows = _labelled(cells, run(cells, meter))
    blind = _seed_first(
        cell for f in plan.families for cell in plan.grid(f, settings.get(f.name), _scales(plan, f, rows, folder))
    )
    if blind:
        with meters("3/3 open-loop replay") as meter:
            rows += _labelled(blind, run(blind, meter))
    return rows, tuned


def _note(row: Row) -> str:
    return f"{row.recipe} · {row.arm} at {row.base_lr * row.lr_multiplier:.3g}: loss {row.final_loss:.3f}"


def _tune(plan: Plan, run: Run, meter: Meter) -> dict[str, Any]:
    """All families side by side, round by round, so that no worker waits for one family's next step."""
    searches = [Tuning(plan, family) for family in plan.families]
    done: dict[str, Cell] = {}
    while new := {
        (i, wish): plan.tuning_cell(s.family, s.setting(wish[0]), plan.seeds(s.family, wish[1] + 1)[-1])
        for i, s in enumerate(searches)
        for wish in s.wanted()
    }:
        rows = run(list(new.values()), _Continued(meter, len(done)))
        for (i, wish), cell in new.items():
            searches[i].rows[wish] = rows[cell.folder]
            done[cell.folder] = cell
    return {s.family.name: s.result() for s in searches}


@dataclass(frozen=True)
class _Continued:
    """A meter that counts on from earlier rounds; how many will follow is not known."""

    meter: Meter
    before: int

    def update(self, done: int, total: int, note: str = "") -> None:
        self.meter.update(self.before + done, self.before + total, note)


def _scales(plan: Plan, family: Family, rows: Sequence[Row], folder: Path) -> dict[str, list[float]]:
    """Contender → its mean scale at multiplier 1, of those that another one replays and that left a whole ledger."""
    found = {}
    for label in dict.fromkeys(c.replays for c in plan.suite.of(family, plan.budget) if c.replays):
        runs = [r for r in rows if (r.recipe, r.arm, r.lr_multiplier) == (family.name, label, 1.0)]
        lacking = lacking_lines(folder, runs)
        whole = [r for r in runs if LEDGER not in lacking.get(r.folder, {})]
        if whole:
            found[label] = mean_scale([folder / r.folder / LEDGER for r in whole])
        elif runs:
            log.warning("%s: no run of %s left a whole ledger, so none is replayed", family.name, label)
    return found


def _seed_first(cells: Iterable[Cell]) -> list[Cell]:
    """Seed by seed over all families: a grid cut short holds whole pairs of each."""
    return sorted(cells, key=lambda cell: cell.recipe.train.seed)


def _labelled(cells: Sequence[Cell], rows: Mapping[str, Row]) -> list[Row]:
    """A row per cell: contenders that come down to the same run share it, and its folder."""
    return [rows[cell.folder].model_copy(update={"arm": cell.arm.label}) for cell in cells]


def _findings(plan: Plan, folder: Path, rows: list[Row], tuned: Mapping[str, Any], command: str) -> dict[str, Any]:
    arms = {row.arm for row in rows}
    reference = TUNED if TUNED in arms else ADAMW
    families = []
    for family in plan.families:
        mine = [row for row in rows if row.recipe == family.name]
        families.append(
            {
                "name": family.name,
                "chosen_on": family.chosen_on,
                "recipe": plan.recipes[family.name].model_dump(mode="json"),
                "tuned": {key: value for key, value in tuned.get(family.name, {}).items() if key != "runs"} or None,
                **record_of_corpus(plan.recipes[family.name], folder / mine[0].folder),
                **measure(mine, folder, reference),
            }
        )
    tell_of_lacking_lines({run: files for family in families for run, files in family["lacking"].items()})
    missing = [f.name for f in plan.suite.families if f not in plan.families]
    provenance = {**record_of_machine(command), "code": in_words(runs_by_code(rows))}
    findings = {
        "schema": 1,
        "suite": plan.suite.name,
        "governor": GUARD,
        "reference_arm": reference,
        "seeds": plan.budget.seeds,
        "multipliers": list(plan.budget.multipliers),
        "runs": len({row.folder for row in rows}),
        "preview": _preview(plan, missing),
        "targets": judge_targets(families, GUARD),
        "source_table": source_table(plan.suite, families),
        "families": families,
        "settings": list(plan.settings),
        "provenance": provenance,
    }
    summary = {**summarise(rows, reference, [GUARD]), "provenance": provenance}
    write_results(folder, Results(rows=rows, summary=summary))
    write_json(folder / STRESS, findings)  # last: a folder with it is finished
    return findings


def _preview(plan: Plan, missing: Sequence[str]) -> list[str]:
    """What keeps these runs from showing what the suite is to show; empty for all of it."""
    budget = plan.budget
    reasons = []
    if budget.seeds < 3:
        reasons.append(f"{budget.seeds} seed{'s' * (budget.seeds > 1)} of 3")
    absent = [m for m in MULTIPLIERS if m not in budget.multipliers]
    if plan.suite.name == "mini" and absent:
        reasons.append(f"{len(budget.multipliers)} of {len(MULTIPLIERS)} multipliers")
    if missing:
        reasons.append(f"{len(plan.families)} of {len(plan.suite.families)} families")
    if plan.settings:
        reasons.append(f"other settings ({', '.join(plan.settings)})")
    return reasons
