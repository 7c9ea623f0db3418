"""Controllers by name, object or folder."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from lbw_rl.controller import Controller

_CLASSES = {
    "constant": ("lbw_rl.controllers.constant", "Constant"),
    "pid": ("lbw_rl.controllers.pid", "PID"),
    "entropic": ("lbw_rl.controllers.entropic", "EntroPIC"),
    "lbw-guard": ("lbw_rl.controllers.lbw_guard", "LBWGuard"),
    "ppo": ("lbw_rl.controllers.ppo", "FrozenPolicy"),
    "random": ("lbw_rl.controllers.random", "RandomActions"),
    "open-loop": ("lbw_rl.controllers.open_loop", "OpenLoop"),
}

CONTROLLERS: tuple[str, ...] = tuple(_CLASSES)
"""Names that `load_controller` accepts."""
RULES: tuple[str, ...] = tuple(name for name in CONTROLLERS if name not in ("ppo", "random", "open-loop"))
"""Those of them that are rules: what a policy may be relative to and hand over to."""


def check_rule(name: str) -> str:
    """The name, if it is a rule's.

    Raises:
        ValueError: it is not.
    """
    if name not in RULES:
        raise ValueError(f"rule: {name!r} is no rule-based controller; accepted: {', '.join(RULES)}")
    return name


def load_controller(controller: str | Path | Controller, **options: Any) -> Controller:
    """A controller by name, from the folder of a frozen policy, or as it is.

    Args:
        controller: one of `CONTROLLERS`, a folder with `policy.json`, or a `Controller`.
        options: keyword arguments for the named controller's constructor.

    Raises:
        ValueError: an unknown name, an option that the controller does not take or a value that it refuses,
            or a folder that holds no intact policy.
    """
    if isinstance(controller, Controller):
        if options:
            raise ValueError(f"controller options {sorted(options)} are only for controllers given by name")
        return controller
    name = str(controller)
    if name not in _CLASSES:
        if name and Path(name).is_dir():
            name, options = "ppo", {"folder": controller, **options}
        else:
            raise ValueError(
                f"controller: unknown name {name!r}; accepted: {', '.join(CONTROLLERS)}, or the folder of a frozen policy"
            )
    module, attribute = _CLASSES[name]
    factory = getattr(importlib.import_module(module), attribute)
    accepted = inspect.signature(factory).parameters
    for option in options:
        if option not in accepted:
            raise ValueError(
                f"controller.options.{option}: {name} has no such option; accepted: {', '.join(accepted) or 'none'}"
            )
    try:
        return factory(**options)
    except TypeError as e:
        raise ValueError(f"controller.options: {e}") from e
