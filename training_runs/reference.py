"""Generates `signals.md` and `metrics.md` from the tables in code: `python -m lbw_rl.training_runs.reference docs`."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from lbw_rl.features import FEATURE_LIMIT, FEATURE_SCHEMA, FEATURES
from lbw_rl.signals import SIGNALS
from lbw_rl.sinks.families import FAMILIES


def reference() -> str:
    """The signal and feature tables as Markdown."""
    signals = "\n".join(
        f"| `{s.name}` | {s.unit} | {_bound(s.low)} … {_bound(s.high)} | {s.source} | {_cell(s.definition)} |"
        for s in SIGNALS.values()
    )
    features = "\n".join(f"| {i} | `{name}` | {_cell(text)} |" for i, (name, text) in enumerate(FEATURES.items()))
    return f"""# Signals and features

Generated from `lbw_rl/signals.py` and `lbw_rl/features.py`; do not edit.

## Signals

One decision window's raw record (`Telemetry`), in physical units. Missing is NaN (`null` in the ledger), never 0.

| signal | unit | range | source | definition |
|---|---|---|---|---|
{signals}

## Feature vector, schema {FEATURE_SCHEMA}

What a learned policy sees: dimensionless, clipped to ±{FEATURE_LIMIT:g}, 0 where a signal was not measured.

| index | feature | definition |
|---|---|---|
{features}
"""


def metrics_reference() -> str:
    """The exporter's metric families as Markdown."""
    families = "\n".join(
        f"| `{f.name}` | {f.kind} | {', '.join(f'`{label}`' for label in f.labels)} | {_cell(f.help)} |"
        for f in FAMILIES
    )
    return f"""# Metrics

Generated from `lbw_rl/sinks/families.py` and `lbw_rl/signals.py`; do not edit. What each is for: [monitoring](monitoring.md).

A metric whose value was not measured, or is not a finite number, is absent from the scrape, never 0.

| metric | type | labels | meaning |
|---|---|---|---|
{families}
"""


def _bound(value: float) -> str:
    return ("∞" if value > 0 else "−∞") if math.isinf(value) else f"{value:g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, text in (("signals.md", reference()), ("metrics.md", metrics_reference())):
        (folder / name).write_text(text, encoding="utf-8")
