"""What this machine offers to a governed run."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import psutil
import torch

from lbw_rl.device import DeviceSource
from lbw_rl.extras import EXTRAS
from lbw_rl.policy import PolicyError

_DRIVER_SECONDS = 10  # a driver without persistence mode takes seconds for each GPU that it wakes


def examine() -> dict[str, Any]:
    """Finding → value; everything is looked up, nothing is assumed."""
    source = DeviceSource()
    findings: dict[str, Any] = {
        "lbw-rl": version("lbw-rl"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "nvml": _gpus(source),
        "policy": _shipped_policy(),
        "links": "ok" if all(find_spec(f"lbw_rl.{p}") for p in ("envs", "controllers", "training_runs")) else "broken",
    }
    source.close()
    for extra, packages in EXTRAS.items():
        findings[f"extra {extra}"] = ", ".join(_package(p) for p in packages)
    return findings


def _gpus(source: DeviceSource) -> str:
    if not source.wait(_DRIVER_SECONDS):
        return f"no answer in {_DRIVER_SECONDS} s: GPU signals are missing (NaN)"
    return ", ".join(source.gpus) or "no NVIDIA driver or no visible GPU: GPU signals are missing (NaN)"


def _package(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} missing"


def _shipped_policy() -> str:
    from lbw_rl.controllers.ppo import newest_pretrained  # the core does not import controllers at import time
    from lbw_rl.policy import load_policy

    try:
        folder = newest_pretrained()
        load_policy(folder)
    except PolicyError as e:
        return str(e)
    return f"{folder.name}, intact"
