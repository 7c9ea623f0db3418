"""The optional packages and the extras of this distribution that bring them."""

from __future__ import annotations

import importlib

EXTRAS = {
    "rl": ("gymnasium", "stable-baselines3"),
    "hf": ("transformers", "tokenizers", "datasets", "peft", "accelerate"),
    "metrics": ("prometheus-client", "tensorboard"),
    "report": ("plotly", "pandas", "pyarrow", "scipy"),
    "ray": ("ray",),
    "lightning": ("lightning",),
    "rivals": ("pytorch-optimizer", "schedulefree", "prodigyopt", "zclip"),
}
"""Extra → packages, by the names that pip knows."""


def extra_of(module: str | None) -> str | None:
    """The extra that brings an importable module, `None` for a module of no extra."""
    package = (module or "").partition(".")[0].replace("_", "-")
    return next((extra for extra, packages in EXTRAS.items() if package in packages), None)


def require(module: str) -> None:
    """Imports a module of an extra.

    Raises:
        ModuleNotFoundError: it is not installed; the message names the extra.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name != module:
            raise  # it is there, and lacks something itself
        package = module.replace("_", "-")
        needs = f"{package} is not installed; accepted: pip install 'lbw-rl[{extra_of(module)}]'"
        raise ModuleNotFoundError(needs, name=module) from e
