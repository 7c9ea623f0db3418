"""The picture of learning curves: which points it takes, and that it is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lbw_rl.training_runs.benchmarks.learning_curve_figure import curves, draw, main
from lbw_rl.training_runs.ppo_session import CURVE_FILE


def training(folder: Path, points: list[dict[str, float | None]]) -> Path:
    folder.mkdir()
    (folder / CURVE_FILE).write_text("".join(json.dumps(point) + "\n" for point in points))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two stages, and a seed that was not finished; a rollout before the first end of a run has no mean."""
    trials = [{"decisions": 100, "gain": 0.1, "diverged": 0.0}, {"decisions": 200, "gain": 0.2, "diverged": 0.0}]
    ppo: list[dict[str, float | None]] = [
        {"decisions": 250.0, "return_mean": None},
        {"decisions": 300.0, "return_mean": 0.3},
    ]
    shifted = [{**point, "gain": point["gain"] + 0.1} for point in trials]
    return [
        training(tmp_path / "one", [*trials, *ppo]),
        training(tmp_path / "two", [*shifted, *ppo]),
        training(tmp_path / "three", trials),
    ]


def test_curves_are_of_the_points_that_all_have(folders: list[Path]) -> None:
    decisions, gains = curves(folders)
    assert decisions == [100, 200]
    assert gains == pytest.approx(np.array([[0.1, 0.2], [0.2, 0.3], [0.1, 0.2]]))
    decisions, gains = curves(folders[:2])
    assert decisions == [100, 200, 300]
    assert gains[:, 2] == pytest.approx([0.3, 0.3])


def test_the_picture_is_drawn(folders: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    draw(folders, tmp_path / "images/curve.png")
    assert (tmp_path / "images/curve.png").read_bytes().startswith(b"\x89PNG")


def test_what_has_no_curve_is_refused(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"folders: .*absent has no learning_curve\.jsonl; accepted"):
        curves([*folders, tmp_path / "absent"])
    later = training(tmp_path / "later", [{"decisions": 1000, "gain": 0.1}])
    with pytest.raises(ValueError, match="have no point in common"):
        curves([*folders, later])
    monkeypatch.setattr("sys.argv", ["figure", str(tmp_path / "absent"), "--target", str(tmp_path / "x.png")])
    with pytest.raises(SystemExit):
        main()
    assert "has no learning_curve.jsonl" in capsys.readouterr().err
