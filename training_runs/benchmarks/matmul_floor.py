"""The bare matrix products of a program, to be timed by themselves: a floor that no such program gets under."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {
    torch.ops.aten.bmm.default: (0, 1),
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
    torch.ops.aten.baddbmm.default: (1, 2),
}
"""Operator → which of its arguments are multiplied."""


class _Recorder(TorchDispatchMode):
    """Notes the operands of every matrix product, those inside attention's fused kernels included."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            left, right = (args[i] for i in _PRODUCTS[func])
            self.pairs.append((_like(left), _like(right)))
        elif func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.pairs += _attention(*args[:3])
        elif func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            self.pairs += _attention_backward(*args[1:4])
        return func(*args, **(kwargs or {}))


def _like(operand: Tensor) -> Tensor:
    """Zeros of the same shape and strides."""
    return torch.empty_strided(operand.shape, operand.stride(), dtype=operand.dtype).zero_()


def _attention(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """q·kᵀ and weights·v, for q, k and v of shape (batch, heads, length, width)."""
    q, k, v = (torch.zeros(t.shape).flatten(0, 1) for t in (q, k, v))
    weights = torch.zeros(len(q), q.shape[1], k.shape[1])
    return [(q, k.transpose(1, 2)), (weights, v)]


def _attention_backward(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The gradients of v, of the weights, of q and of k; the weights, made anew by the fused kernel, do not count."""
    q, k, v = (torch.zeros(t.shape).flatten(0, 1) for t in (q, k, v))
    weights, out = torch.zeros(len(q), q.shape[1], k.shape[1]), torch.zeros(*q.shape[:2], v.shape[2])
    turned = weights.transpose(1, 2)
    return [(turned, out), (out, v.transpose(1, 2)), (weights, k), (turned, q)]


def matmuls_of(program: Callable[[], object]) -> Callable[[], None]:
    """The matrix products that `program` executes, on zeros of the same shapes and strides, into ready memory.

    Args:
        program: is run once.

    Returns:
        A function that executes the products alone, in the same order.
    """
    with _Recorder() as recorder:
        program()
    ready = [(a, b, a @ b) for a, b in recorder.pairs]

    def products() -> None:
        for a, b, out in ready:
            torch.matmul(a, b, out=out)

    return products
