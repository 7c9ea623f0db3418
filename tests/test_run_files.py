"""The other files of a run: replaced at once or not at all, and lines that a disk does not take are left out."""

import json
import os
from pathlib import Path

import pytest
from checkpoint_files import fail_on, failing, names, warnings
from full_disk import disk_of

from lbw_rl.ledger import truncate_jsonl
from lbw_rl.training_runs import folders
from lbw_rl.training_runs.folders import JsonLines, first_line, replace_folder, write_json


@pytest.mark.parametrize("point", ["open 1", "fsync 1", "rename"])
def test_json_is_replaced_at_once_or_not_at_all(point, tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"a": 1})
    with monkeypatch.context() as patch:
        fail_on(patch, point)
        with pytest.raises(OSError, match="Input/output"):
            write_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert names(tmp_path) == ["x.json"]


def test_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch):
    def make(name: str, *files: str) -> Path:
        (tmp_path / name / "deep").mkdir(parents=True)
        for file in files:
            (tmp_path / name / "deep" / file).write_text(file)
        return tmp_path / name

    replace_folder(make("model.tmp", "a", "b"), tmp_path / "model")
    assert names(tmp_path) == ["model"]
    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "fsync", failing)
        with pytest.raises(OSError, match="Input/output"):
            replace_folder(make("model.tmp", "c"), tmp_path / "model")
    assert names(tmp_path / "model/deep") == ["a", "b"]
    make("model.old.tmp", "left by a kill")
    replace_folder(tmp_path / "model.tmp", tmp_path / "model")
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model/deep") == ["c"]


def test_a_line_that_the_disk_does_not_take_is_left_out(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as lines:
        lines.write({"step": 0})
        with disk_of(15):  # in the middle of the second line
            lines.write({"step": 1})
            lines.write({"step": 2})
        lines.write({"step": 3})
        lines.sync()
    assert path.read_text() == '{"step":0}\n{"step":3}\n'
    assert warnings(caplog) == ["metrics.jsonl lacks lines that the disk did not take: File too large"] or (
        warnings(caplog) == ["metrics.jsonl lacks lines that the disk did not take: No space left on device"]
    )


def test_lines_that_have_no_file_cost_a_warning(tmp_path, caplog):
    """A full disk does not even take the name of a new file."""
    (tmp_path / "metrics.jsonl").mkdir()
    with JsonLines(tmp_path / "metrics.jsonl") as lines:
        lines.write({"step": 0})
        lines.sync()
    assert warnings(caplog) == ["metrics.jsonl lacks lines that the disk did not take: Is a directory"]


def test_a_failing_sync_is_no_fault_of_the_run(tmp_path, monkeypatch, caplog):
    with JsonLines(tmp_path / "x") as lines:
        monkeypatch.setattr(os, "fsync", failing)
        lines.sync()
    assert len(warnings(caplog)) == 1


HEADER = '{"type":"header","schema":1}\n'
DECISIONS = [f'{{"type":"decision","step":{i},"é":1.0e0}}\n' for i in range(5)]

LEDGERS = {
    "whole": ([HEADER, *DECISIONS], 3),
    "torn at the end": ([HEADER, *DECISIONS[:3], '{"type":"deci'], 3),
    "ends too early": ([HEADER, *DECISIONS[:2]], 2),
    "torn header": ([HEADER[5:], *DECISIONS], 3),
    "torn first lines": ([HEADER[5:], DECISIONS[0][9:], *DECISIONS[1:]], 2),
    "no header": (DECISIONS, 3),
    "two headers": ([HEADER, DECISIONS[0], HEADER, *DECISIONS[1:]], 3),
    "header too late": ([DECISIONS[0], HEADER, *DECISIONS[1:]], 3),
    "zeros in the middle": ([HEADER, DECISIONS[0], "\0" * 40 + "\n", *DECISIONS[2:]], 2),
    "other JSON": ([HEADER, "3\n", '{"step":"x"}\n', *DECISIONS], 3),
    "empty": ([], 0),
}


@pytest.mark.parametrize("case", LEDGERS)
def test_a_damaged_ledger_keeps_its_good_lines_and_one_header(case, tmp_path):
    path = tmp_path / "ledger.jsonl"
    content, good = LEDGERS[case]
    path.write_text("".join(content), encoding="utf-8")
    assert truncate_jsonl(path, 3, HEADER.rstrip("\n"))["decision"] == good
    first, *rest = path.read_text(encoding="utf-8").splitlines(keepends=True)
    assert first == HEADER
    assert rest == [line for line in content if line in DECISIONS[:3]]


def test_a_ledger_that_is_not_text_loses_those_lines_alone(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(HEADER.encode() + b"\xff\xfe\n" + DECISIONS[0].encode())
    assert truncate_jsonl(path, 3) == {"decision": 1}
    assert path.read_text(encoding="utf-8") == HEADER + DECISIONS[0]


def test_a_missing_file_is_not_made(tmp_path):
    assert truncate_jsonl(tmp_path / "ledger.jsonl", 3, HEADER) == {}
    assert first_line(tmp_path / "ledger.jsonl") is None
    assert names(tmp_path) == []


def test_events_between_decisions_stay_and_are_no_decisions(tmp_path):
    path = tmp_path / "ledger.jsonl"
    events = [f'{{"type":"mode","step":{i}}}\n' for i in (1, 3)]
    path.write_text(HEADER + DECISIONS[0] + events[0] + events[1], encoding="utf-8")
    assert truncate_jsonl(path, 3) == {"decision": 1, "mode": 1}
    assert path.read_text(encoding="utf-8") == HEADER + DECISIONS[0] + events[0]
