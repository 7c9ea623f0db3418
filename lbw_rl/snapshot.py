"""The last good state of a run, kept in host memory for a rollback."""

from __future__ import annotations

from typing import Any

import torch


class Snapshot:
    """Copies of everything that an optimizer owns: its parameters and its state.

    Args:
        optimizer: read on `take`, written on `restore`.
        byte_budget: a state larger than this is not copied.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, byte_budget: int) -> None:
        self.optimizer = optimizer
        self.byte_budget = byte_budget
        self.step: int | None = None
        self._parameters: list[torch.Tensor] = []
        self._state: list[dict[str, Any]] = []

    def bytes_needed(self) -> int:
        """Size of one copy, in bytes."""
        tensors = [t for p in self._owned() for t in (p, *self.optimizer.state.get(p, {}).values())]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))

    @torch.no_grad()
    def take(self, step: int) -> bool:
        """Replaces the copy with the present state; False if it does not fit the budget."""
        if self.bytes_needed() > self.byte_budget:
            return False
        self._parameters = [p.detach().to("cpu", copy=True) for p in self._owned()]
        self._state = [
            {
                k: v.detach().to("cpu", copy=True) if isinstance(v, torch.Tensor) else v
                for k, v in self.optimizer.state.get(p, {}).items()
            }
            for p in self._owned()
        ]
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
        for parameter, value, state in zip(self._owned(), self._parameters, self._state):
            parameter.copy_(value)
            if not state:  # as before its first step, when some optimizers test for membership
                self.optimizer.state.pop(parameter, None)
                continue
            present = self.optimizer.state[parameter]
            for key in [k for k in present if k not in state]:
                del present[key]
            for key, saved in state.items():
                if isinstance(saved, torch.Tensor) and isinstance(present.get(key), torch.Tensor):
                    present[key].copy_(saved)
                else:
                    present[key] = saved.clone() if isinstance(saved, torch.Tensor) else saved

    def _owned(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """The copy itself, for a checkpoint."""
        return {"step": self.step, "parameters": self._parameters, "state": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.step, self._parameters, self._state = state["step"], state["parameters"], state["state"]
