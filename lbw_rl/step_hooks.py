"""Where governance enters an optimizer: around each of its steps, once, with the gradients in place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch


class StepHooks:
    """Calls `begin` when a step's gradients are there and nothing is updated yet, and `end` after the step.

    Three things make that more than two hooks: a subclass whose `step` calls `super().step()` fires them twice; a step
    that raises never reaches its post hook; and a step with a closure (Lightning always passes one) makes its gradients
    inside, so `begin` waits for the closure's first call.

    Args:
        optimizer: to hook into.
        hold: called before a step with a closure, for optimizers that read their rate before they call it.
        begin: called with the closure's result, None without a closure.
        again: called after each further call of the same closure, as line searches make them.
        end: called after the step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        hold: Callable[[], None],
        begin: Callable[[Any], None],
        again: Callable[[], None],
        end: Callable[[], None],
    ) -> None:
        self._hold, self._begin, self._again, self._end = hold, begin, again, end
        self._stepping: FrameType | None = None  # the optimizer's step that is under way
        self._active = True
        self._handles = [
            optimizer.register_step_pre_hook(torch.compiler.disable(self._before)),
            optimizer.register_step_post_hook(torch.compiler.disable(self._after)),
        ]

    def _before(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._active or self._within_step():
            return None
        self._stepping = _step_frame()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._begin(None)
            return None
        self._hold()
        if "closure" in kwargs:
            return args, {**kwargs, "closure": self._beginning_after(closure)}
        return (args[0], self._beginning_after(closure), *args[2:]), kwargs

    def _beginning_after(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        begun = False

        def call() -> Any:
            nonlocal begun
            result = closure()
            if begun:
                self._again()
            else:
                begun = True
                self._begin(result)
            return result

        return call

    def _after(self, *_: Any) -> None:
        if _step_frame() is not self._stepping:
            return
        self._stepping = None
        if self._active:
            self._end()

    def _within_step(self) -> bool:
        """Whether a step is under way; one that raised is told apart by having left the stack."""
        frame: FrameType | None = sys._getframe(1) if self._stepping is not None else None
        while frame is not None and frame is not self._stepping:
            frame = frame.f_back
        return frame is not None

    def remove(self) -> None:
        """Takes the hooks off; safe to call twice.

        Within a step torch is iterating over them, so they only fall silent; a later call takes them off.
        """
        self._active = False
        if self._within_step():
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _step_frame() -> FrameType | None:
    """The frame that called the hook: the optimizer's step, past the wrapper that keeps dynamo out of the hook."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("torch._dynamo"):
        frame = frame.f_back
    return frame
