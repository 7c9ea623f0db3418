"""The last good state of a run, kept in host memory for a rollback."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from lbw_rl.random_state import capture_random_state, restore_random_state
from lbw_rl.sample import is_sharded

_OF_THE_SCHEDULE = frozenset(
    {"lr", "initial_lr", "betas", "momentum", "max_lr", "min_lr", "max_momentum", "base_momentum"}
)


class Stateful(Protocol):
    """A scheduler, a `GradScaler`, a controller: anything with torch's two methods."""

    def state_dict(self) -> dict[str, Any]:
        """All of its state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Restores it."""
        ...


class Snapshot:
    """A copy of everything that training moves: weights, buffers, optimizer, what else is handed in, random generators.

    Only what the optimizer owns is copied of the weights: under LoRA the adapters, under FSDP2 this rank's shards. An
    optimizer's state includes what it keeps in its parameter groups (Prodigy's d, Schedule-Free's counters). What a
    scheduler writes there (rate, betas, momentum) goes back only if a scheduler is among `stateful`, since a schedule
    that is not rewound would not write it again.

    On an accelerator the copies go to pinned memory asynchronously, in the order of the stream, so that neither `take`
    nor `restore` waits for the device.

    Args:
        optimizer: read on `take`, written on `restore`.
        byte_budget: a state larger than this is not copied.
        model: whose buffers are part of the state.
        stateful: name → whatever else goes back with the weights: scheduler, scaler, controller.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        byte_budget: int,
        model: torch.nn.Module | None = None,
        stateful: Mapping[str, Stateful] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.byte_budget = byte_budget
        self.model = model
        self.stateful = dict(stateful or {})
        self.step: int | None = None
        self._tensors: list[torch.Tensor] = []
        self._state: list[dict[str, Any]] = []
        self._groups: list[dict[str, Any]] = []
        self._loose: dict[Any, Any] = {}
        self._others: dict[str, Any] = {}
        self._random: dict[str, Any] = {}
        self._of: list[int] | None = None  # whose copy it is; unknown for one from a checkpoint

    def bytes_needed(self) -> int:
        """Size of one copy, in bytes."""
        states = [t for p in self._owned() for t in self.optimizer.state.get(p, {}).values()]
        tensors = [t for t in (*self._owned(), *self._buffers(), *states) if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in map(_shard, tensors))

    @torch.no_grad()
    def take(self, step: int) -> bool:
        """Replaces the copy with the present state; False if it does not fit the budget."""
        if self.bytes_needed() > self.byte_budget:
            return False
        tensors = [_to_host(t) for t in (*self._owned(), *self._buffers())]
        own_state = [
            {k: _to_host(v) if isinstance(v, torch.Tensor) else copy.deepcopy(v) for k, v in state.items()}
            for state in (self.optimizer.state.get(p, {}) for p in self._owned())
        ]
        groups = [
            {
                k: _to_host(v) if isinstance(v, torch.Tensor) else copy.deepcopy(v)
                for k, v in group.items()
                if k != "params"
            }
            for group in self.optimizer.param_groups
        ]
        others = {name: copy.deepcopy(other.state_dict()) for name, other in self.stateful.items()}
        loose = {k: copy.deepcopy(v) for k, v in self.optimizer.state.items() if not isinstance(k, torch.Tensor)}
        # All or nothing: a copy that failed half way must not be mixed with the one before.
        self._tensors, self._state, self._groups = tensors, own_state, groups
        self._loose, self._others, self._of = loose, others, [id(p) for p in self._owned()]
        self._random = capture_random_state()
        self.step = step
        return True

    @torch.no_grad()
    def restore(self) -> None:
        """Writes the copy back in place, bit for bit.

        Raises:
            RuntimeError: nothing has been taken yet.
        """
        if self.step is None:
            raise RuntimeError("no snapshot has been taken yet")
        present = (*self._owned(), *self._buffers())
        shapes = [_shard(t).shape for t in present] == [t.shape for t in self._tensors]
        if not shapes or self._of not in (None, [id(p) for p in self._owned()]):
            raise RuntimeError("parameters or buffers are not those of the snapshot")
        for tensor, saved in zip(present, self._tensors):
            _write(tensor, saved)
        for parameter, state in zip(self._owned(), self._state):
            if not state:  # as before its first step, when some optimizers test for membership
                self.optimizer.state.pop(parameter, None)
                continue
            _restore_values(self.optimizer.state[parameter], state, parameter)
        self.optimizer.state.update(copy.deepcopy(self._loose))
        scheduled = frozenset() if self._rewinds_the_schedule() else _OF_THE_SCHEDULE
        for group, saved_group in zip(self.optimizer.param_groups, self._groups):
            _restore_values(group, {k: v for k, v in saved_group.items() if k not in scheduled}, None)
        for name, other in self.stateful.items():
            other.load_state_dict(copy.deepcopy(self._others[name]))
        restore_random_state(self._random)

    def _rewinds_the_schedule(self) -> bool:
        schedulers = (torch.optim.lr_scheduler.LRScheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        return "scheduler" in self.stateful or any(isinstance(s, schedulers) for s in self.stateful.values())

    def _owned(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _buffers(self) -> list[torch.Tensor]:
        return list(self.model.buffers()) if self.model is not None else []

    def state_dict(self) -> dict[str, Any]:
        """The copy itself, for a checkpoint."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # the copies may still be on their way
        return {
            "step": self.step,
            "tensors": self._tensors,
            "state": self._state,
            "groups": self._groups,
            "loose": self._loose,
            "others": self._others,
            "random": self._random,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self.step, self._tensors, self._state = state["step"], state["tensors"], state["state"]
        self._groups, self._loose = state["groups"], state["loose"]
        self._others, self._random, self._of = state["others"], state["random"], None

    def drop(self) -> None:
        """Forgets the copy."""
        self.step = None
        self._tensors, self._state, self._groups = [], [], []
        self._loose, self._others, self._random = {}, {}, {}


def _shard(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    local = _shard(tensor.detach())
    if local.device.type == "cpu":
        return local.clone()
    copied = torch.empty(local.shape, dtype=local.dtype, device="cpu", pin_memory=True)
    return copied.copy_(local, non_blocking=True)


def _write(tensor: torch.Tensor, saved: torch.Tensor) -> None:
    _shard(tensor.detach()).copy_(saved, non_blocking=True)


def _restore_values(present: dict[str, Any], saved: Mapping[str, Any], like: torch.Tensor | None) -> None:
    """Puts saved values into a live dict: tensors in place, since compiled steps and captured graphs hold on to them."""
    if like is not None:
        for key in [k for k in present if k not in saved]:
            del present[key]
    for key, value in saved.items():
        live = present.get(key)
        if isinstance(value, torch.Tensor) and isinstance(live, torch.Tensor) and _shard(live).shape == value.shape:
            _write(live, value)
        elif isinstance(value, torch.Tensor):
            present[key] = value.clone() if like is None else _as_state(value, like)
        else:
            present[key] = copy.deepcopy(value)


def _as_state(saved: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A state tensor anew, on its parameter's device and sharded like it; a step counter stays on the host."""
    if not saved.ndim:
        return saved.clone()
    if not is_sharded(like):
        return saved.to(like.device, copy=True)
    fresh = torch.empty_like(like, dtype=saved.dtype)
    _write(fresh, saved)
    return fresh
