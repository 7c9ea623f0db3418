"""Frozen policy files: what is intact runs as trained, everything else is refused with its reason."""

import hashlib
import json
import pickle
import shutil
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load, save

from lbw_rl import FEATURES, Authority, load_controller
from lbw_rl.features import FEATURE_LIMIT
from lbw_rl.policy import CARD_FILE, HEADER_FILE, WEIGHTS_FILE, Policy, PolicyError, load_policy, save_policy

N = len(FEATURES)


def freeze(folder, layers=None, **changes):
    if layers is None:
        layers = [(np.zeros((2, N), np.float32), np.zeros(2, np.float32))]
    options = {
        "mean": np.zeros(N),
        "std": np.ones(N),
        "authority": Authority(),
        "decide_every": 1,
        "provenance": {"seed": 1},
        "card": "# Card",
    }
    return save_policy(folder, layers, **(options | changes))


@pytest.fixture
def folder(policy_folder, tmp_path):
    """A copy of an intact policy, to be damaged."""
    return shutil.copytree(policy_folder, tmp_path / "policy")


def edit_header(folder, **changes):
    header = json.loads((folder / HEADER_FILE).read_text())
    (folder / HEADER_FILE).write_text(json.dumps(header | changes))


def replace_weights(folder, content: bytes):
    """Other weights under a hash that fits them: a forgery, not an accident."""
    (folder / WEIGHTS_FILE).write_bytes(content)
    edit_header(folder, weights_sha256=hashlib.sha256(content).hexdigest())


def refusal(folder) -> str:
    """The one line with which the folder is refused, by the loader and by the controller alike."""
    with pytest.raises(PolicyError) as caught:
        load_policy(folder)
    with pytest.raises(ValueError) as again:
        load_controller(str(folder))
    assert str(again.value) == str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- intact


@pytest.mark.parametrize("hidden", [[], [7], [16, 5]])
def test_a_policy_computes_what_was_frozen(tmp_path, hidden):
    rng = np.random.default_rng(0)
    sizes = [N, *hidden, 2]
    layers = [
        (rng.normal(size=(o, i)).astype(np.float32), rng.normal(size=o).astype(np.float32)) for i, o in pairwise(sizes)
    ]
    mean, std = rng.normal(size=N), rng.uniform(0.5, 2, N)
    policy = load_policy(freeze(tmp_path / "p", layers, mean=mean, std=std))
    for features in rng.uniform(-FEATURE_LIMIT, FEATURE_LIMIT, (20, N)):
        x = (features - mean) / std
        for weight, bias in layers[:-1]:
            x = np.tanh(weight.astype(float) @ x + bias)
        expected = np.clip(layers[-1][0].astype(float) @ x + layers[-1][1], -1, 1)
        assert policy.action(features) == pytest.approx(expected, abs=1e-4)


def test_the_header_says_where_the_policy_comes_from(tmp_path):
    folder = freeze(tmp_path / "p", decide_every=4, provenance={"seed": 7, "torch": "2.13"}, card="# Made by seed 7")
    header = load_policy(folder).header
    assert header.decide_every == 4
    assert header.provenance == {"seed": 7, "torch": "2.13"}
    assert header.authority == Authority()
    assert dict(header.features) == FEATURES
    assert (folder / CARD_FILE).read_text() == "# Made by seed 7"
    assert sorted(p.name for p in folder.iterdir()) == sorted([CARD_FILE, HEADER_FILE, WEIGHTS_FILE])


def test_a_fingerprint_is_of_what_a_policy_does_and_not_of_where_it_comes_from(tmp_path):
    changes = [
        {},
        {"provenance": {"seed": 7}},
        {"decide_every": 4},
        {"stretches": 3, "rule": "lbw-guard"},
        {"mean": np.ones(N)},
    ]
    one, other, *different = (load_policy(freeze(tmp_path / f"{i}", **c)).fingerprint for i, c in enumerate(changes))
    assert one == other
    assert len({one, *different}) == 4


def test_freezing_over_an_older_policy_replaces_it(tmp_path):
    freeze(tmp_path / "p", decide_every=1)
    assert load_policy(freeze(tmp_path / "p", decide_every=2)).header.decide_every == 2


@given(arrays(np.float64, N, elements=st.floats(-FEATURE_LIMIT, FEATURE_LIMIT)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_action_lies_within_minus_one_and_one(policy_folder, features):
    assert (np.abs(load_policy(policy_folder).action(features)) <= 1).all()


def test_loading_makes_no_use_of_pickle(policy_folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert isinstance(load_policy(policy_folder), Policy)


# ---- refused


@pytest.mark.parametrize("missing", [HEADER_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    assert f"has no {missing}" in refusal(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(PolicyError, match="is not a folder"):
        load_policy(tmp_path / "nowhere")


def test_a_missing_card_does_no_harm(folder):
    (folder / CARD_FILE).unlink()
    load_policy(folder)


@given(st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_as_weights_are_refused(tmp_path_factory, policy_folder, content):
    folder = shutil.copytree(policy_folder, tmp_path_factory.mktemp("forged") / "policy")
    (folder / WEIGHTS_FILE).write_bytes(content)
    assert "altered" in refusal(folder)
    replace_weights(folder, content)
    assert WEIGHTS_FILE in refusal(folder)


@given(st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_as_header_are_refused(tmp_path_factory, policy_folder, content):
    folder = shutil.copytree(policy_folder, tmp_path_factory.mktemp("forged") / "policy")
    (folder / HEADER_FILE).write_bytes(content)
    refusal(folder)


@pytest.mark.parametrize("position", [0, 9, 200, -1])
def test_one_flipped_bit_in_the_weights_is_noticed(folder, position):
    content = bytearray((folder / WEIGHTS_FILE).read_bytes())
    content[position] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(content)
    assert "SHA-256" in refusal(folder)
    assert "altered" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '"policy"', "[" * 100_000, "1" * 5000])
def test_a_header_that_is_no_json_object_is_refused(folder, text):
    (folder / HEADER_FILE).write_text(text)
    refusal(folder)


def test_a_truncated_header_is_refused(folder):
    text = (folder / HEADER_FILE).read_text()
    for length in range(0, len(text) - 2, max(1, len(text) // 20)):
        (folder / HEADER_FILE).write_text(text[:length])
        assert f"{HEADER_FILE} is not JSON" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"policy_schema": 1}, "policy_schema is 1; this version reads 2"),
        ({"feature_schema": 1}, "feature_schema is 1; this version computes 3"),
        ({"features": dict(reversed(FEATURES.items()))}, "in that order"),
        ({"features": {k: FEATURES[k] for k in list(FEATURES)[1:]}}, "in that order"),
        ({"feature_limit": 5.0}, "features are"),
        ({"mean": [0.0] * (N - 1)}, f"mean must be {N} finite numbers"),
        ({"mean": [float("nan")] * N}, f"mean must be {N} finite numbers"),
        ({"std": [0.0] * N}, f"std must be {N} finite numbers > 0"),
        ({"std": [float("inf")] * N}, f"std must be {N} finite numbers > 0"),
        ({"hidden_sizes": [3]}, "layer 0"),
        ({"hidden_sizes": [16, 16]}, "hidden_sizes [16, 16] need"),
        ({"authority": {"lr_scale": [2.0, 3.0]}}, "authority.lr_scale"),
        ({"decide_every": 0}, "decide_every"),
        ({"fallback": {"controller": "ppo"}}, "fallback.controller"),
        ({"fallback": {"controller": "/some/folder"}}, "is no rule-based controller; accepted: constant, pid"),
        ({"surprise": 1}, "surprise"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_header_that_is_not_ours_is_refused_by_field(folder, changes, reason):
    edit_header(folder, **changes)
    assert reason in refusal(folder)


def test_a_header_without_a_field_is_refused_by_its_name(folder):
    header = json.loads((folder / HEADER_FILE).read_text())
    for field in ("policy_schema", "feature_schema", "mean", "authority", "weights_sha256", "provenance"):
        (folder / HEADER_FILE).write_text(json.dumps({k: v for k, v in header.items() if k != field}))
        assert field in refusal(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t | {"1.bias": np.full(2, np.nan, np.float32)}, "non-finite"),
        (lambda t: t | {"0.weight": t["0.weight"] * np.float32(np.inf)}, "non-finite"),
        (lambda t: t | {"0.weight": t["0.weight"].T.copy()}, "layer 0"),
        (lambda t: t | {"0.weight": t["0.weight"].astype(np.float64)}, "layer 0 is float64"),
        (lambda t: t | {"0.bias": t["0.bias"].astype(np.int32)}, "layer 0 is float32"),
        (lambda t: {k: v for k, v in t.items() if k != "1.bias"}, "hidden_sizes [16] need"),
        (lambda t: t | {"2.weight": np.zeros((2, 2), np.float32)}, "holds"),
    ],
    ids=["nan", "inf", "transposed", "float64", "integer bias", "missing", "extra"],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
def test_weights_that_the_header_does_not_describe_are_refused(folder, change, reason):
    replace_weights(folder, save(change(load((folder / WEIGHTS_FILE).read_bytes()))))
    assert reason in refusal(folder)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "I64", "BOOL", "X9"])
def test_weights_of_a_dtype_that_numpy_may_not_know_are_refused(folder, dtype):
    head = json.dumps({"0.weight": {"dtype": dtype, "shape": [8], "data_offsets": [0, 16]}}).encode()
    replace_weights(folder, len(head).to_bytes(8, "little") + head + bytes(16))
    assert WEIGHTS_FILE in refusal(folder)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def test_a_pickle_renamed_is_refused_without_running_it(folder, tmp_path):
    replace_weights(folder, pickle.dumps(Bomb(tmp_path / "exploded")))
    assert f"{WEIGHTS_FILE} is not a safetensors file" in refusal(folder)
    (folder / HEADER_FILE).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert f"{HEADER_FILE} is not JSON" in refusal(folder)
    assert not (tmp_path / "exploded").exists()


# ---- freezing


@pytest.mark.parametrize(
    "layers",
    [
        [(np.full((2, N), np.nan, np.float32), np.zeros(2, np.float32))],
        [(np.zeros((2, N + 1), np.float32), np.zeros(2, np.float32))],
        [(np.zeros((3, N), np.float32), np.zeros(3, np.float32))],
    ],
    ids=["nan", "wrong input", "wrong output"],
)
def test_a_policy_that_would_not_load_is_not_frozen(tmp_path, layers):
    with pytest.raises(PolicyError):
        freeze(tmp_path / "p", layers)
    assert not (tmp_path / "p" / HEADER_FILE).exists()
