"""Learn-by-wire: a bounded governance layer above the optimizer of an LLM training run."""

import importlib
from typing import TYPE_CHECKING, Any

from lbw_rl.action import Action, Directive
from lbw_rl.authority import Authority
from lbw_rl.controller import Context, Controller
from lbw_rl.features import FEATURES
from lbw_rl.registry import CONTROLLERS, load_controller
from lbw_rl.signals import SIGNALS, Telemetry

if TYPE_CHECKING:
    from lbw_rl.exchange import PeerLostError
    from lbw_rl.governor import Governor
    from lbw_rl.param_groups import split_parameter_groups

__version__ = "0.2.0.dev0"

__all__ = [
    "CONTROLLERS",
    "FEATURES",
    "SIGNALS",
    "Action",
    "Authority",
    "Context",
    "Controller",
    "Directive",
    "Governor",
    "PeerLostError",
    "Telemetry",
    "load_controller",
    "split_parameter_groups",
]

# The parts that need torch: `lbw-rl --help` should not wait for it.
_LAZY = {"Governor": "governor", "PeerLostError": "exchange", "split_parameter_groups": "param_groups"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lbw_rl.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
