"""Learns the gradient norm before clipping from `torch.nn.utils.clip_grad_norm_`, which throws nothing away but tells nobody."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch

_listeners: weakref.WeakSet[ClipTap] = weakref.WeakSet()
_original: Callable[..., torch.Tensor] | None = None
_wrapper: Callable[..., torch.Tensor] | None = None


class ClipTap:
    """Hears of every L2 clipping of all of an optimizer's gradients, while it is open.

    Trainer, Accelerate and Lightning clip before the optimizer's hooks run, and call `torch.nn.utils.clip_grad_norm_`
    as an attribute of its module. While a tap is open that attribute is a wrapper, which returns what the original
    returns. A loop that imported the function by name goes past it: such a loop has the norm, and passes it to
    `Governor.observe(grad_norm=…)`.

    Args:
        optimizer: whose gradients count; a clipping of some of them only is not the global norm.
        listener: told the norm before clipping.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, listener: Callable[[torch.Tensor], None]) -> None:
        self._optimizer, self._listener = optimizer, listener
        _listeners.add(self)
        weakref.finalize(self, _uninstall_if_unheard).atexit = False  # for a governor that nobody closes
        _install()

    def heard(self, clipped: list[torch.Tensor], norm: torch.Tensor) -> None:
        """Passes the norm on if all gradients of the optimizer were clipped by it."""
        ids = {id(p) for p in clipped}
        own = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        if own and all(id(p) in ids for p in own):
            self._listener(torch.as_tensor(norm).detach())

    def close(self) -> None:
        """Stops listening; the last one puts torch's function back."""
        _listeners.discard(self)
        _uninstall_if_unheard()


def _install() -> None:
    global _original, _wrapper
    if _original is not None and torch.nn.utils.clip_grad_norm_ is not _original:
        return
    original = _original = torch.nn.utils.clip_grad_norm_

    @functools.wraps(original)
    def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2.0, *args: Any, **kwargs: Any) -> Any:
        listening = [tap for tap in _listeners if norm_type == 2.0]
        if listening and not isinstance(parameters, torch.Tensor):
            parameters = list(parameters)  # a generator can be read once only
        norm = original(parameters, max_norm, norm_type, *args, **kwargs)
        for tap in listening:
            with contextlib.suppress(Exception):  # whatever a patched clipping returns, its caller gets it
                tap.heard([parameters] if isinstance(parameters, torch.Tensor) else parameters, norm)
        return norm

    _wrapper = torch.nn.utils.clip_grad_norm_ = torch.nn.utils.clip_grad.clip_grad_norm_ = clip_grad_norm_


def _uninstall_if_unheard() -> None:
    if not any(True for _ in _listeners):  # its length counts the dead
        _uninstall()


def _uninstall() -> None:
    global _original, _wrapper
    if _original is None:
        return
    # Unless someone has wrapped ours since: then theirs stays, and ours within it hears for nobody.
    if torch.nn.utils.clip_grad_norm_ is _wrapper:
        torch.nn.utils.clip_grad_norm_ = _original
    if torch.nn.utils.clip_grad.clip_grad_norm_ is _wrapper:
        torch.nn.utils.clip_grad.clip_grad_norm_ = _original
    _original = _wrapper = None
