"""The signal table: one definition per signal, and a record that tells "missing" from "zero"."""

import json
import math
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbw_rl import SIGNALS, Telemetry


def test_the_table_is_the_record():
    assert [*SIGNALS, "group_grad_entropy"] == [f.name for f in fields(Telemetry)]
    assert all(name == signal.name for name, signal in SIGNALS.items())


@pytest.mark.parametrize("signal", SIGNALS.values(), ids=list(SIGNALS))
def test_every_signal_is_documented(signal):
    assert signal.unit
    assert signal.source in {"governor", "optimizer", "model", "gradient", "clock", "device"}
    assert len(signal.definition.split()) >= 3
    assert signal.low < signal.high


def test_the_telemetry_that_the_mission_names_is_all_there():
    named = {"loss", "grad_norm", "grad_entropy", "update_ratio", "surprise", "grad_cosine", "tokens_per_second"}
    assert named | {"gpu_utilization", "gpu_memory", "gpu_power", "gpu_temperature"} <= set(SIGNALS)


def test_missing_is_nan_never_zero():
    assert all(math.isnan(v) for v in Telemetry().as_dict().values())


@given(st.dictionaries(st.sampled_from(list(SIGNALS)), st.floats(allow_nan=False, allow_infinity=False)))
def test_round_trip_through_json(values):
    record = Telemetry(**values).as_dict()
    assert list(record) == list(SIGNALS)
    line = json.dumps({k: None if math.isnan(v) else v for k, v in record.items()}, allow_nan=False)
    again = Telemetry.from_dict(json.loads(line)).as_dict()
    for name in SIGNALS:
        assert again[name] == record[name] or (math.isnan(again[name]) and name not in values)


def test_what_is_known_of_each_group_goes_through_json_and_only_where_it_is_known():
    record = Telemetry(loss=1.0, group_grad_entropy=(0.5, math.nan)).as_record()
    record["group_grad_entropy"] = [None if math.isnan(v) else v for v in record["group_grad_entropy"]]
    again = Telemetry.from_dict({k: v for k, v in record.items() if v == v})
    assert again.group_grad_entropy[0] == 0.5
    assert math.isnan(again.group_grad_entropy[1])
    assert "group_grad_entropy" not in Telemetry(loss=1.0).as_record()
    for value in ("high", ["high"], 1.0):
        with pytest.raises(ValueError, match=r"group_grad_entropy is .* accepted: a list of numbers and None"):
            Telemetry.from_dict({"group_grad_entropy": value})


def test_none_reads_as_missing():
    assert math.isnan(Telemetry.from_dict({"loss": None, "step": 3}).loss)


def test_unknown_signal_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'vocabulary'.*known: step, progress"):
        Telemetry.from_dict({"loss": 1.0, "vocabulary": 5})


@pytest.mark.parametrize("value", ["high", [1.0], {}])
def test_a_value_that_is_no_number_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"loss is .* accepted: a number, or None"):
        Telemetry.from_dict({"loss": value})
