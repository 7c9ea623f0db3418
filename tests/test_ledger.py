"""The ledger: strict JSON lines that survive a kill, and errors that say what is wrong."""

import json
import math
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from full_disk import disk_of
from hypothesis import given
from hypothesis import strategies as st

from lbw_rl.ledger import Ledger, read_ledger, truncate_jsonl

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=8,
)


def strictly(line):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(line, parse_constant=refuse)


def cleaned(value):
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: cleaned(v) for k, v in value.items()}
    return [cleaned(v) for v in value] if isinstance(value, list) else value


@given(st.lists(st.dictionaries(st.text(min_size=1).filter(lambda k: k != "type"), JSON, max_size=4), max_size=4))
def test_what_is_written_reads_back_with_non_finite_numbers_as_null(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    ledger = Ledger(path)
    for record in records:
        ledger.write("decision", record)
    ledger.close()
    assert list(read_ledger(path)) == [{"type": "decision", **cleaned(r)} for r in records]
    for line in path.read_text().splitlines():
        strictly(line)


def test_numbers_of_other_libraries_are_written_as_numbers(tmp_path):
    ledger = Ledger(tmp_path / "l.jsonl")
    ledger.write("decision", {"a": np.float32(0.5), "b": torch.tensor(2.0), "c": np.int64(3), "d": np.float32("nan")})
    ledger.close()
    assert strictly((tmp_path / "l.jsonl").read_text()) == {"type": "decision", "a": 0.5, "b": 2.0, "c": 3, "d": None}


def test_a_line_is_on_its_way_to_disk_before_the_step_goes_on(tmp_path):
    path = tmp_path / "made" / "on" / "the" / "way" / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.write("header", {"schema": 1})
    assert [r["type"] for r in read_ledger(path)] == ["header"]
    ledger.close()


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_torn_by_a_kill_is_passed_over_and_cut_when_the_ledger_goes_on(tmp_path, cut):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for step in range(3):
        ledger.write("decision", {"step": step})
    ledger.close()
    os.truncate(path, path.stat().st_size - cut)
    assert [r["step"] for r in read_ledger(path)] == ([0, 1, 2] if cut == 1 else [0, 1])
    ledger = Ledger(path)
    ledger.write("decision", {"step": 7})
    ledger.close()
    assert [r["step"] for r in read_ledger(path)] == [0, 1, 7]


def test_a_torn_line_longer_than_one_block_is_cut_whole(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"type":"header"}\n' + "x" * 200_000)
    Ledger(path).close()
    assert path.read_text() == '{"type":"header"}\n'
    path.write_text('{"type":' + "x" * 200_000)
    Ledger(path).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("content", ['{"a": 1}', "notes\nmore notes", "\n"])
def test_a_mistyped_path_costs_nobody_a_file(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(OSError, match="is no ledger, and is left as it is"):
        Ledger(path)
    assert path.read_text() == content


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_os_error_for_the_caller():
    with pytest.raises(OSError, match="No space left"):
        Ledger("/dev/full").write("decision", {"step": 0})


@pytest.mark.parametrize("length", [50, 3000, 20_000])
def test_a_disk_that_was_full_for_a_while_costs_whole_lines(tmp_path, length):
    """Half a line in the middle would make the rest unreadable, however long lines are and wherever the disk ends."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    written = []
    for step in range(12):
        full = 3 <= step < 9
        with disk_of(3 * length + length // 2) if full else nullcontext():
            try:
                ledger.write("decision", {"step": step, "evidence": "e" * length})
                written.append(step)
            except OSError:
                assert full
    ledger.close()
    assert written == [*range(3), *range(9, 12)]
    assert [r["step"] for r in read_ledger(path)] == written


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"type":"header"}\nnot json\n{"type":"decision"}\n', "line 2 is not JSON"),
        ('{"type":"header"}\n{"step":1}\n', "line 2 has no 'type'"),
        ("[1, 2]\n", "line 1 has no 'type'"),
    ],
)
def test_an_altered_ledger_is_refused_with_its_line(tmp_path, text, reason):
    path = tmp_path / "ledger.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        list(read_ledger(path))


def test_a_missing_ledger_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a file; accepted: a ledger"):
        list(read_ledger(tmp_path))


def test_truncating_drops_the_later_steps_and_torn_lines_and_leaves_every_other_byte(tmp_path):
    path = tmp_path / "l.jsonl"
    whole = [b'{"type":"header","schema":1}\n', *(b'{"type":"decision", "step":%d}\n' % i for i in range(6))]
    event = b'{"type":"skip","step":3}\n'
    path.write_bytes(b"".join([*whole[:4], event, b"no json\n", *whole[4:], b'{"type":"decision","step":1']))
    assert truncate_jsonl(path, 3) == {"decision": 3}
    assert path.read_bytes() == b"".join(whole[:4])
    assert [p.name for p in tmp_path.iterdir()] == ["l.jsonl"]


def test_truncating_where_nothing_is_late_or_there_is_no_ledger_does_nothing(tmp_path):
    path = tmp_path / "l.jsonl"
    path.write_bytes(b'{"type":"header"}\n{"type":"decision","step":2}\n')
    before = path.stat()
    assert truncate_jsonl(path, 3) == {"decision": 1}
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert truncate_jsonl(tmp_path / "none.jsonl", 0) == {}
    assert [p.name for p in tmp_path.iterdir()] == ["l.jsonl"]
