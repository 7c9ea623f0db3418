"""The picture of the learning-rate axis: whose runs it takes, and that it is drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lbw_rl.training_runs.benchmarks.lr_axis_figure import draw, main
from lbw_rl.training_runs.results import Results, Row, read_results, write_results


def finished(folder: Path, recipe: str, arm: str) -> Path:
    numbers = {"base_lr": 1e-3, "initial_loss": 6.0, "steps": 10, "seconds": 1.0, "overhead_seconds": 0.0}
    counts = {"skips": 0, "rollbacks": 0, "diverged": False}
    rows = [
        Row(recipe=recipe, optimizer="adamw", controller=arm, lr_multiplier=m, seed=s, final_loss=4 + s, **numbers, **counts)
        for m in (0.1, 1.0, 10.0)
        for s in (0, 1)
    ]  # fmt: skip
    write_results(folder, Results(rows=rows))
    return folder


def test_several_results_go_into_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = finished(tmp_path / "one", "mini-qwen2", "constant")
    two = finished(tmp_path / "two", "mini-llama", "lbw-guard") / "results.parquet"
    picture = tmp_path / "images" / "axis.png"
    command = ["lr_axis_figure", str(one), str(two), str(picture), "--arms", "adamw;lbw-guard", "--governed", "2"]
    monkeypatch.setattr(sys, "argv", command)
    main()
    assert picture.stat().st_size > 1000
    monkeypatch.setattr(sys, "argv", [*command, "--families", "mini-gpt"])
    with pytest.raises(ValueError, match="families: no run of 'mini-gpt'; accepted: mini-llama, mini-qwen2"):
        main()


def test_more_arms_than_colours_are_refused(tmp_path: Path) -> None:
    rows = [row for i in range(10) for row in read_results(finished(tmp_path / str(i), "mini", f"arm-{i}")).rows]
    with pytest.raises(ValueError, match="arms: 10 of them; accepted: at most 9"):
        draw(rows, tmp_path / "axis.png", ["mini"], [f"arm-{i}" for i in range(10)])
