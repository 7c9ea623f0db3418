"""Learn-by-wire: a bounded governance layer above the optimizer of an LLM training run."""

from lbw_rl.action import Action, Directive
from lbw_rl.authority import Authority
from lbw_rl.controller import Context, Controller
from lbw_rl.features import FEATURES
from lbw_rl.governor import Governor
from lbw_rl.registry import CONTROLLERS, load_controller
from lbw_rl.signals import SIGNALS, Telemetry

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
