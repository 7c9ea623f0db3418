"""`results.json` and `results.parquet`: what a comparison found, one row a run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator

from lbw_rl.extras import require
from lbw_rl.training_runs.summary import UNGOVERNED, summarise

__all__ = ["Results", "Row", "read_results", "summarise", "write_results"]


class Row(BaseModel):
    """One finished run.

    A loss that is missing, NaN or infinite means divergence. A diverged run keeps its row: its
    `final_loss` is capped at `initial_loss` on construction, and `final_ppl` follows.

    Attributes:
        recipe: name of the recipe that was run.
        optimizer: the optimizer's name.
        controller: the controller's name or policy folder; `none` or `constant` for the optimizer alone.
        arm: label that the report groups by; defaults to the controller, or the optimizer without one.
        lr_multiplier: multiple of `base_lr` that the run was started with, > 0.
        base_lr: the recipe's learning rate for this optimizer, > 0.
        seed: runs of different arms with the same seed are pairs.
        final_loss: held-out loss at the end, nats per token.
        final_ppl: exp(final_loss).
        initial_loss: held-out loss of the untrained model, nats per token.
        diverged: whether the run ended without a usable model.
        steps: optimizer steps attempted.
        seconds: wall time of the run.
        overhead_seconds: part of `seconds` that the governor took.
        skips: updates that the governor skipped.
        rollbacks: returns to an earlier state.
        steps_to_target: first step at which the held-out loss met the recipe's target, `None` if never.
        decisions: decisions of the controller; 0 where they were not counted.
        interventions: decisions whose executed action was not neutral.
        code: version of the package that made the run (`code_version`); empty where it was not recorded.
        folder: the run's folder relative to that of `results.json`, with forward slashes.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    recipe: str
    optimizer: str
    controller: str
    arm: str = ""
    lr_multiplier: FiniteFloat = Field(gt=0)
    base_lr: FiniteFloat = Field(gt=0)
    seed: int
    final_loss: FiniteFloat
    final_ppl: FiniteFloat
    initial_loss: FiniteFloat
    diverged: bool
    steps: int = Field(ge=0)
    seconds: FiniteFloat = Field(ge=0)
    overhead_seconds: FiniteFloat = Field(ge=0)
    skips: int = Field(ge=0)
    rollbacks: int = Field(ge=0)
    steps_to_target: int | None = None
    decisions: int = Field(default=0, ge=0)
    interventions: int = Field(default=0, ge=0)
    code: str = ""
    folder: str = ""

    @model_validator(mode="before")
    @classmethod
    def _cap_and_label(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        row = dict(data)
        final, initial = row.get("final_loss", 0.0), row.get("initial_loss")
        if _is_finite(initial):
            if final is None or (isinstance(final, float) and not math.isfinite(final)):
                row.update(final_loss=initial, final_ppl=None, diverged=True)
            elif row.get("diverged") is True and _is_finite(final) and final > initial:
                row.update(final_loss=initial, final_ppl=None)
        if row.get("final_ppl") is None or row["final_ppl"] == math.inf:
            row["final_ppl"] = _perplexity(row.get("final_loss"))
        if not row.get("arm"):
            governed = str(row.get("controller", "")) not in UNGOVERNED
            row["arm"] = row.get("controller" if governed else "optimizer", "")
        return row

    @field_validator("folder")
    @classmethod
    def _stays_inside(cls, folder: str) -> str:
        path = PurePosixPath(folder)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"must be relative and inside the results' own folder, got {folder!r}")
        return folder


class Results(BaseModel):
    """The whole of `results.json`.

    Attributes:
        schema_version: `schema` in JSON; this version reads and writes 1.
        rows: one a run.
        summary: what `summarise` returned, with `provenance` beside it.
    """

    model_config = ConfigDict(populate_by_name=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    rows: list[Row]
    summary: dict[str, Any] = Field(default_factory=dict)


def read_results(path: str | Path) -> Results:
    """Reads a `results.json`, the one in a folder, or the rows of a `.parquet`.

    Raises:
        ValueError: missing, not such a file, or not of this schema; one line that names the field.
        ModuleNotFoundError: a `.parquet` without the extra `lbw-rl[report]`.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    try:
        if path.suffix == ".parquet":
            return Results.model_validate({"schema": 1, "rows": _parquet_rows(path)})
        return Results.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as e:
        accepted = "accepted: a results.json, its folder, or a .parquet of rows"
        raise ValueError(f"results: cannot read {path} ({e.strerror}); {accepted}") from e
    except ValidationError as e:
        first = e.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "top level"
        value = repr(first["input"])
        shown = value if len(value) <= 60 else value[:57] + "..."
        raise ValueError(f"results: {path}: {field}: {first['msg']}, got {shown}") from e
    except ValueError as e:
        raise ValueError(f"results: {path} is not {'Parquet' if path.suffix == '.parquet' else 'JSON'} ({e})") from e


def write_results(directory: str | Path, results: Results) -> None:
    """Writes `results.json` and `results.parquet` (the rows) into `directory`, which is made.

    Each file is replaced whole, so that a reader or a kill never meets half of one.

    Raises:
        OSError: the folder cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / "results.parquet", lambda target: _write_parquet(target, results.rows))
    data = results.model_dump(by_alias=True, mode="python")
    text = json.dumps(_finite(data), indent=1, ensure_ascii=False, allow_nan=False)
    _replace(directory / "results.json", lambda target: target.write_text(text + "\n", encoding="utf-8"))


def _write_parquet(target: Path, rows: list[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types: dict[Any, Any] = {str: pa.string(), float: pa.float64(), bool: pa.bool_()}
    fields = Row.model_fields.items()  # what is left is int or int | None, and every column may be null
    schema = pa.schema([(name, types.get(info.annotation, pa.int64())) for name, info in fields])
    pq.write_table(pa.Table.from_pylist([row.model_dump() for row in rows], schema=schema), target)


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    """A null is a field that was not recorded."""
    require("pyarrow")
    import pyarrow.parquet as pq

    rows = pq.read_table(path).to_pylist()
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _perplexity(loss: Any) -> float | None:
    return math.exp(min(loss, 700.0)) if _is_finite(loss) else None  # e^700 is the last that a float holds


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: both become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
