"""State dicts as JSON that reads back exactly, tensors and non-finite numbers included."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import torch

_TENSOR, _FLOAT, _MAPPING = "__tensor__", "__float__", "__mapping__"


def to_json(value: Any) -> Any:
    """A state as plain JSON data.

    Tensors become their dtype, shape and bytes in base64, NaN and infinities become text, tuples become lists.

    Args:
        value: nested mappings with text keys, lists and tuples of tensors, numbers, text, booleans and None.

    Raises:
        TypeError: anything else.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT: str(float(value))}
    if isinstance(value, torch.Tensor):
        return {
            _TENSOR: {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), **_bytes(value)}
        }
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, Mapping):
        if odd := [k for k in value if not isinstance(k, str)]:
            raise TypeError(f"state: key {odd[0]!r} is {type(odd[0]).__name__}; accepted: text")
        plain = {k: to_json(v) for k, v in value.items()}
        return {_MAPPING: plain} if {_TENSOR, _FLOAT, _MAPPING} & plain.keys() else plain
    raise TypeError(
        f"state: {type(value).__name__} is no JSON; accepted: mappings, lists, tensors, numbers, text, None"
    )


def from_json(value: Any) -> Any:
    """Inverse of `to_json`; tensors come back on the CPU.

    Raises:
        ValueError: a tensor whose bytes are not those of its dtype and shape.
    """
    if isinstance(value, list):
        return [from_json(v) for v in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_FLOAT}:
        return float(value[_FLOAT])
    if value.keys() == {_TENSOR}:
        return _tensor(value[_TENSOR])
    if value.keys() == {_MAPPING}:
        value = value[_MAPPING]
    return {k: from_json(v) for k, v in value.items()}


def _bytes(tensor: torch.Tensor) -> dict[str, str]:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise TypeError(
            f"state: a {tensor.layout} tensor on {tensor.device} has no plain bytes; accepted: dense tensors"
        )
    # A conjugated or negated view has flags that its bytes do not show.
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return {"data": base64.b64encode(plain.view(torch.uint8).numpy().tobytes()).decode("ascii")}


def _tensor(record: Mapping[str, Any]) -> torch.Tensor:
    dtype, shape = getattr(torch, str(record["dtype"]), None), record["shape"]
    data = base64.b64decode(record["data"], validate=True)
    if not isinstance(dtype, torch.dtype) or len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"state: {len(data)} bytes are no tensor of {record['dtype']} {shape}")
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
