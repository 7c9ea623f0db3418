"""Where governance enters an optimizer: around each of its steps, once, with the gradients in place."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch


class _Call(dict[str, Any]):
    """A step's keyword arguments, which live as long as its frame."""

    __slots__ = ("__weakref__",)


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
        left: called once a step that raised, and with it its traceback, is gone.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        hold: Callable[[], None],
        begin: Callable[[Any], None],
        again: Callable[[], None],
        end: Callable[[], None],
        left: Callable[[], None],
    ) -> None:
        self._hold, self._begin, self._again, self._end = hold, begin, again, end
        self._left = left
        self._stepping: int | None = None  # id of the frame of the step under way; it is alive while `_call` is
        self._call: weakref.ref[_Call] | None = None
        self._frame: FrameType | None = None
        self._active = True
        self._handles = [
            optimizer.register_step_pre_hook(torch.compiler.disable(self._before)),
            optimizer.register_step_post_hook(torch.compiler.disable(self._after)),
        ]

    def _before(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._active or self.within_step():
            return None
        self._stepping = id(_step_frame())
        kwargs = kwargs if isinstance(kwargs, _Call) else _Call(kwargs)  # of another governor's hook, in shadow mode
        self._call = weakref.ref(kwargs, self._gone)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._begin(None)
            return args, kwargs
        self._hold()
        if "closure" in kwargs:
            kwargs["closure"] = self._beginning_after(closure)
            return args, kwargs
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
        if id(_step_frame()) != self._stepping:
            return
        self._stepping = self._call = self._frame = None
        if self._active:
            self._end()

    def within_step(self) -> bool:
        """Whether a step is under way; one that raised is told apart by having left the stack."""
        alive = self._frame is not None or (self._call is not None and self._call() is not None)
        return alive and self._on_stack() is not None

    def _on_stack(self) -> FrameType | None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and id(frame) != self._stepping:
            frame = frame.f_back
        return frame

    def _gone(self, call: Any) -> None:
        if call is not self._call:
            return
        frame = self._on_stack()
        if frame is not None:  # someone else's hook has replaced the arguments: hold on to the frame itself
            self._frame = frame
            return
        self._stepping = self._call = None  # the post hook never came: the step raised, and its traceback is gone
        self._left()

    def remove(self) -> None:
        """Takes the hooks off; safe to call twice.

        Within a step torch is iterating over them, so they only fall silent; a later call takes them off.
        """
        self._active = False
        if self.within_step():
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
