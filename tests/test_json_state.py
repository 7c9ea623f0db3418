"""States go through JSON and come back bit for bit."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lbw_rl.json_state import from_json, to_json


def strictly(value):
    """There and back through JSON as the standard has it: no NaN, no Infinity."""
    return from_json(json.loads(json.dumps(to_json(value), allow_nan=False, sort_keys=True)))


FLOATS = ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128"]
WHOLE = ["bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"]


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in (*FLOATS, *WHOLE)], ids=str)
def test_a_tensor_of_every_dtype_and_shape_keeps_its_bits(dtype):
    for shape in ((), (0,), (3,), (2, 0, 3), (2, 3, 4)):
        count = math.prod(shape) * dtype.itemsize
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
        tensor = (raw.view(dtype) if count else torch.empty(0, dtype=dtype)).reshape(shape)
        back = strictly(tensor)
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert bits(back) == bits(tensor)


def test_views_come_back_whole_and_writable():
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    for view in (base.t(), base[:, 1::2], torch.tensor(1.0).expand(3), torch.tensor([1 + 2j]).conj()):
        back = strictly(view)
        assert torch.equal(back, view.detach())
        back += 1  # its own memory, not a read-only buffer


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(), st.sampled_from(["__tensor__", "__float__", "__mapping__"])), inner),
    ),
    max_leaves=8,
)


@given(VALUES)
def test_nested_values_come_back_equal_whatever_their_keys(value):
    assert strictly(value) == value


def test_nan_infinities_and_minus_zero_come_back_and_tuples_become_lists():
    back = strictly({"a": (1, (math.nan, math.inf)), "b": [-math.inf, -0.0]})
    assert isinstance(back["a"], list)
    assert math.isnan(back["a"][1][0])
    assert back["a"][1][1] == math.inf
    assert back["b"][0] == -math.inf
    assert math.copysign(1, back["b"][1]) == -1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({1: 2}, r"key 1 is int; accepted: text"),
        ({"a": [object()]}, r"object is no JSON; accepted: mappings"),
        (torch.eye(2).to_sparse(), r"torch.sparse_coo tensor on cpu has no plain bytes"),
        (torch.empty(2, device="meta"), r"on meta has no plain bytes"),
    ],
)
def test_what_is_no_state_is_refused(value, said):
    with pytest.raises(TypeError, match=said):
        to_json(value)


def test_bytes_that_do_not_fit_are_refused():
    record = to_json(torch.ones(2))
    record["__tensor__"]["shape"] = [3]
    with pytest.raises(ValueError, match=r"8 bytes are no tensor of float32 \[3\]"):
        from_json(record)
    with pytest.raises(ValueError, match=r"no tensor of nn"):
        from_json({"__tensor__": {"dtype": "nn", "shape": [], "data": ""}})
