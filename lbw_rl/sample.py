"""Which elements of a model are looked at: a fixed sample, the same however the parameters are sharded."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

SAMPLE_SIZE = 4_096


@dataclass(frozen=True, slots=True)
class Part:
    """One parameter's share of the sample.

    Attributes:
        parameter: the sampled parameter, possibly a `DTensor`.
        group: its parameter group.
        stride: step between sampled elements of the whole (unsharded) tensor, flattened.
        position: where its elements begin in the sample.
        count: how many there are.
        local_offset: first sampled element of the local shard, flattened.
        local_position, local_count: where this rank's elements lie in the sample, and how many this rank
            contributes; 0 where another rank holds them or answers for them.
    """

    parameter: torch.Tensor
    group: dict[str, Any]
    stride: int
    position: int
    count: int
    local_offset: int
    local_position: int
    local_count: int


class Sample:
    """Every `stride`-th element of each trainable weight matrix, about `size` in all, shared out in proportion to size.

    Of every tensor where there is no matrix. Under FSDP2 each rank reads the elements that lie in its own shard; the
    sum over ranks is the sample that one process would have read. What is replicated, rank 0 answers for.

    Args:
        groups: the optimizer's parameter groups.
        size: elements sampled over all matrices.
        answers: whether this process answers for what every rank holds alike (rank 0, or a process alone).
    """

    def __init__(self, groups: list[dict[str, Any]], size: int = SAMPLE_SIZE, *, answers: bool = True) -> None:
        present = [(p, group) for group in groups for p in group["params"] if p.numel()]
        self.parameters: list[torch.Tensor] = [p for p, _ in present]
        present = [(p, group) for p, group in present if p.requires_grad] or present
        present = [(p, group) for p, group in present if _sliced_by_rows(p)]
        chosen = [(p, group) for p, group in present if p.ndim >= 2] or present
        total = sum(p.numel() for p, _ in chosen)
        self.parts: list[Part] = []
        self.size = 0
        for p, group in chosen:
            part = _part(p, group, _stride(p, size, total), self.size, answers)
            self.parts.append(part)
            self.size += part.count
        self.groups: list[tuple[dict[str, Any], int]] = [
            (members[0].group, sum(part.count for part in members))
            for members in (list(run) for _, run in groupby(self.parts, key=lambda part: id(part.group)))
        ]
        """The sampled parameter groups in order, each with its number of elements."""
        self._local = sum(part.local_count for part in self.parts)
        self.whole = self._local == self.size
        """Whether this process contributes every element."""
        self.sharded = any(is_sharded(p) for p in self.parameters)
        """Whether gradients are spread over ranks."""
        self.device = _local(chosen[0][0]).device if chosen else torch.device("cpu")
        self._spread = len({p.device for p, _ in chosen}) > 1  # layers of one model on several devices

    @torch.no_grad()
    def gather(
        self, read: Callable[[Part], torch.Tensor | None], views: list[tuple[int, torch.Tensor]] | None = None
    ) -> torch.Tensor:
        """This rank's elements in their places, zeros elsewhere: float32, shape (size,), a copy.

        Args:
            read: part → the tensor to sample, shaped and sharded as its parameter; None reads as zeros.
            views: the strided views of an earlier call, reused while every tensor still lies where it lay.
        """
        if not self._local:
            return torch.zeros(self.size, device=self.device)
        if self.sharded:
            sources = [_local(read(part)) if part.local_count else None for part in self.parts]
        else:
            sources = [read(part) for part in self.parts]
        pointers = [0 if t is None else t.data_ptr() for t in sources] if views is not None else []
        if views and [pointer for pointer, _ in views] == pointers:
            pieces = [view for _, view in views]
        else:
            pieces = [_elements(t, part) for t, part in zip(sources, self.parts)]
            if views is not None and all(t is None or t.is_contiguous() for t in sources):
                views[:] = list(zip(pointers, pieces))
        if self._spread:
            pieces = [piece.to(self.device, non_blocking=True) for piece in pieces]
        return (torch.cat(pieces) if self.whole else torch.cat(self._padded(pieces))).float()

    def _padded(self, pieces: list[torch.Tensor]) -> list[torch.Tensor]:
        """The pieces with zeros between them wherever another rank's elements belong."""
        padded: list[torch.Tensor] = []
        end = 0
        for part, piece in zip(self.parts, pieces):
            if not part.local_count:
                continue
            padded += [piece.new_zeros(part.local_position - end), piece]
            end = part.local_position + part.local_count
        return [*padded, pieces[0].new_zeros(self.size - end)]


def is_sharded(tensor: object) -> bool:
    """Whether it is a `DTensor`; where nobody has imported them there are none, and the import takes its time."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def own_shard(tensor: torch.Tensor, *, answers: bool) -> torch.Tensor | None:
    """What this rank contributes of a tensor when ranks are added up: None where another rank answers for it."""
    if not is_sharded(tensor):
        return tensor if answers else None
    return tensor.to_local() if _answers_for_shard(tensor) else None  # type: ignore[attr-defined]


def _answers_for_shard(tensor: Any) -> bool:
    """Whether this rank is the first of those that hold the same shard."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    return all(c == 0 for c, p in zip(coordinate, tensor.placements) if p.is_replicate())


def _local(tensor: torch.Tensor | None) -> Any:
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[union-attr]


def _sliced_by_rows(parameter: torch.Tensor) -> bool:
    """Whether a shard is a run of consecutive elements: a plain tensor, or a `DTensor` cut along its rows alone."""
    if not is_sharded(parameter):
        return True
    placements = parameter.placements  # type: ignore[attr-defined]
    return all(p.is_replicate() or (type(p).__name__ == "Shard" and p.dim == 0) for p in placements)


def _part(parameter: torch.Tensor, group: dict[str, Any], stride: int, position: int, answers: bool) -> Part:
    count = -(-parameter.numel() // stride)
    if not is_sharded(parameter):
        return Part(parameter, group, stride, position, count, 0, position, count if answers else 0)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape,
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
    )
    begin = offset[0] * (parameter.numel() // parameter.shape[0]) if math.prod(shape) else 0
    end = begin + math.prod(shape)
    first = -(-begin // stride)
    held = max(0, -(-end // stride) - first)
    return Part(
        parameter,
        group,
        stride,
        position,
        count,
        first * stride - begin,
        position + first,
        held if _answers_for_shard(parameter) else 0,
    )


def _stride(parameter: torch.Tensor, sample: int, total: int) -> int:
    """Step between sampled elements; coprime to the row length, so that no column is favoured."""
    wanted = max(32, round(sample * parameter.numel() / total))
    stride = max(1, parameter.numel() // wanted)
    row = parameter.shape[-1] if parameter.ndim else 1
    while math.gcd(stride, row) > 1:
        stride -= 1
    return stride


def _elements(tensor: torch.Tensor | None, part: Part) -> torch.Tensor:
    """The sampled elements of a local tensor: a view where it is contiguous."""
    if tensor is None or not part.local_count:
        return torch.zeros(part.local_count, device=_local(part.parameter).device)
    if tensor.is_contiguous():
        offset = tensor.storage_offset() + part.local_offset
        return torch.as_strided(tensor, (part.local_count,), (part.stride,), offset)
    return tensor.reshape(-1)[part.local_offset :: part.stride]
