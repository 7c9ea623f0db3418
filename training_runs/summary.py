"""From the rows of a comparison to its figures of merit: cells, arms, and paired comparisons.

Throughout, a run that diverged counts with its loss capped at the untrained model's; none is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from lbw_rl.registry import RULES
from lbw_rl.training_runs.intervals import judge, mean_interval

if TYPE_CHECKING:
    from lbw_rl.training_runs.results import Row

Cells = dict[tuple[str, float], list["Row"]]
"""(arm, learning-rate multiplier) → its runs, one a seed; of one recipe."""

UNGOVERNED = frozenset({"", "none", "off", "constant"})
"""Names of `controller` that leave the optimizer alone; `constant` still observes it."""

_CONTROLS = frozenset({"random", "open-loop"})
_NOT_LEARNED = UNGOVERNED | _CONTROLS | set(RULES)


def capped(row: Row) -> float:
    """min(final, initial) loss, nats per token: what LR sensitivity averages (Wortsman et al. 2309.14322)."""
    return min(row.final_loss, row.initial_loss)


def lr_sensitivity(losses: Iterable[float]) -> float:
    """Mean of one loss per multiplier, capped at the initial loss, minus their minimum (nats; ≥ 0).

    Source: Wortsman et al. 2309.14322, section 2.2: E_η[min(ℓ(η), ℓ₀)] − ℓ*.
    """
    losses = list(losses)
    return fmean(losses) - min(losses)


def default_reference(rows: Sequence[Row]) -> str:
    """The arm that the others are held against if none is named: AdamW, or the first ungoverned one."""
    arms = list(dict.fromkeys(row.arm for row in rows))
    ungoverned = [row.arm for row in rows if row.controller in UNGOVERNED]
    return "AdamW" if "AdamW" in arms else (ungoverned or arms or [""])[0]


def default_subjects(rows: Sequence[Row], reference_arm: str) -> list[str]:
    """The arms that the verdict is about: the frozen policies, or every governed arm if there is none."""
    governed = {row.arm: row.controller for row in rows if row.controller not in UNGOVERNED}
    governed.pop(reference_arm, None)
    learned = [arm for arm, c in governed.items() if c not in _NOT_LEARNED and "untrained" not in arm]
    return learned or [arm for arm, c in governed.items() if c not in _CONTROLS]


def summarise(rows: Sequence[Row], reference_arm: str, subjects: Sequence[str] | None = None) -> dict[str, Any]:
    """Statistics of a comparison, as JSON data.

    Args:
        rows: the runs; recipes are kept apart, pairs share recipe and seed.
        reference_arm: the arm that, at its own best multiplier, is the LR-tuned baseline.
        subjects: arms to compare with every other one; by default `default_subjects`.

    Returns:
        `reference_arm`; `subjects`; `reference`: recipe → the tuned baseline's multiplier, loss and ppl;
        `cells`: a dict per recipe × arm × multiplier; `arms`: a dict per recipe × arm; `comparisons`: a
        dict per recipe × subject × other arm. Losses in nats per token, ratios are of perplexities,
        intervals cover 95 % and are `None` where there is nothing to resample (`interval_note` says why).

    Raises:
        ValueError: `reference_arm` or a subject is not an arm of `rows`.
    """
    arms = list(dict.fromkeys(row.arm for row in rows))
    subjects = default_subjects(rows, reference_arm) if subjects is None else list(subjects)
    for name, value in [("reference_arm", reference_arm), *(("subjects", s) for s in subjects)]:
        if rows and value not in arms:
            raise ValueError(f"{name}: {value!r} is not an arm of these results; arms: {', '.join(arms)}")
    summary: dict[str, Any] = {
        "reference_arm": reference_arm,
        "subjects": subjects,
        "reference": {},
        "cells": [],
        "arms": [],
        "comparisons": [],
    }
    for recipe in dict.fromkeys(row.recipe for row in rows):
        cells: Cells = {}
        for row in rows:
            if row.recipe == recipe:
                cells.setdefault((row.arm, row.lr_multiplier), []).append(row)
        best = {arm: _best_multiplier(cells, arm) for arm in dict.fromkeys(arm for arm, _ in cells)}
        tuned = cells[reference_arm, best[reference_arm]] if reference_arm in best else []
        if tuned:
            summary["reference"][recipe] = {
                "lr_multiplier": tuned[0].lr_multiplier,
                "final_loss": fmean(r.final_loss for r in tuned),
                "final_ppl": median(r.final_ppl for r in tuned),
            }
        ordered = sorted(cells, key=_order(best))
        summary["cells"] += [{"recipe": recipe, **_cell(cells[key], tuned)} for key in ordered]
        grid = {multiplier for _, multiplier in cells}
        summary["arms"] += [{"recipe": recipe, **_arm(cells, arm, best[arm], len(grid))} for arm in best]
        summary["comparisons"] += [
            {"recipe": recipe, "arm": a, "against": b, **_comparison(cells, best, a, b)}
            for a in subjects
            for b in best
            if a in best and a != b
        ]
    return summary


def _order(arms: Iterable[str]) -> Any:
    place = {arm: i for i, arm in enumerate(arms)}
    return lambda key: (place[key[0]], key[1])


def _best_multiplier(cells: Cells, arm: str) -> float:
    means = {m: fmean(capped(r) for r in rows) for (a, m), rows in cells.items() if a == arm}
    return min(means, key=lambda m: (means[m], abs(math.log(m))))


def _paired(a: Iterable[Row], b: Iterable[Row]) -> list[float]:
    """Differences in capped loss (nats) over the seeds that both have."""
    other = {row.seed: capped(row) for row in b}
    return [capped(row) - other[row.seed] for row in a if row.seed in other]


def _cell(rows: list[Row], tuned: list[Row]) -> dict[str, Any]:
    losses, ppls = [r.final_loss for r in rows], [r.final_ppl for r in rows]
    reached = [math.inf if r.steps_to_target is None else r.steps_to_target for r in rows]
    loss_interval = mean_interval(losses)
    differences = _paired(rows, tuned)
    against_tuned = mean_interval(differences)
    note = None if loss_interval else "one seed" if len(rows) == 1 else "all seeds equal"
    return {
        "arm": rows[0].arm,
        "lr_multiplier": rows[0].lr_multiplier,
        "base_lr": rows[0].base_lr,
        "n": len(rows),
        "diverged": sum(r.diverged for r in rows),
        "loss_median": median(losses),
        "loss_mean": fmean(losses),
        "loss_range": [min(losses), max(losses)],
        "loss_interval": loss_interval,
        "ppl_median": median(ppls),
        "ppl_mean": fmean(ppls),
        "ppl_range": [min(ppls), max(ppls)],
        "ppl_interval": mean_interval(ppls),
        "interval_note": note,
        "pairs": len(differences),
        "ratio_to_tuned": math.exp(fmean(differences)) if differences else None,
        "ratio_to_tuned_median": math.exp(median(differences)) if differences else None,
        "ratio_to_tuned_interval": [math.exp(v) for v in against_tuned] if against_tuned else None,
        "seconds": median(r.seconds for r in rows),
        "steps_to_target": median(reached) if math.isfinite(median(reached)) else None,
        "reached_target": sum(map(math.isfinite, reached)),
    }


def _arm(cells: Cells, arm: str, best: float, grid: int) -> dict[str, Any]:
    mine = {m: rows for (a, m), rows in cells.items() if a == arm}
    rows = [row for at_multiplier in mine.values() for row in at_multiplier]
    worst = max(rows, key=lambda r: r.final_loss)
    overheads = [r.overhead_seconds / r.seconds for r in rows if r.seconds > 0]
    return {
        "arm": arm,
        "optimizer": rows[0].optimizer,
        "controller": rows[0].controller,
        "runs": len(rows),
        "diverged": sum(r.diverged for r in rows),
        "divergence_rate": sum(r.diverged for r in rows) / len(rows),
        "multipliers": sorted(mine),
        "grid_complete": len(mine) == grid,
        "lr_sensitivity": lr_sensitivity(fmean(capped(r) for r in mine[m]) for m in mine),
        "best_multiplier": best,
        "best_ppl": median(r.final_ppl for r in mine[best]),
        "worst_multiplier": worst.lr_multiplier,
        "worst_ppl": worst.final_ppl,
        "overhead_fraction": median(overheads) if overheads else None,
        "seconds": median(r.seconds for r in rows),
        "interventions": median(r.interventions for r in rows),
        "skips": sum(r.skips for r in rows),
        "rollbacks": sum(r.rollbacks for r in rows),
    }


def _comparison(cells: Cells, best: dict[str, float], a: str, b: str) -> dict[str, Any]:
    """`a` against `b`, paired by seed: averaged over the shared multipliers, and each at its own best."""
    shared = sorted({m for arm, m in cells if arm == a} & {m for arm, m in cells if arm == b})
    by_seed: dict[int, list[float]] = {}
    for m in shared:
        other = {row.seed: capped(row) for row in cells[b, m]}
        for row in cells[a, m]:
            if row.seed in other:
                by_seed.setdefault(row.seed, []).append(capped(row) - other[row.seed])
    return {
        "multipliers": shared,
        "same_lr": judge([fmean(d) for d in by_seed.values()]),
        "each_tuned": judge(_paired(cells[a, best[a]], cells[b, best[b]])),
    }
