"""Learn-by-wire: a bounded governance layer above the optimizer of an LLM training run."""

from typing import TYPE_CHECKING, Any

from lbw_rl.action import Action, Directive
from lbw_rl.authority import Authority
from lbw_rl.controller import Context, Controller
from lbw_rl.features import FEATURES
from lbw_rl.registry import CONTROLLERS, load_controller
from lbw_rl.signals import SIGNALS, Telemetry

if TYPE_CHECKING:
    from lbw_rl.governor import Governor

__version__ = "0.1.0"

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
    "Telemetry",
    "load_controller",
]


def __getattr__(name: str) -> Any:
    if name == "Governor":  # the only part that needs torch: `lbw-rl --help` should not wait for it
        from lbw_rl.governor import Governor

        globals()["Governor"] = Governor
        return Governor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
