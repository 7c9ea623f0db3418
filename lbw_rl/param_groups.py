"""One parameter group per tensor, for control that fine: split before a scheduler is built, merged in checkpoints."""

from __future__ import annotations

from typing import Any

import torch


def split_parameter_groups(optimizer: torch.optim.Optimizer) -> list[str]:
    """Splits every parameter group into one group per parameter, in place.

    Each new group has the settings of the one that it came from, so an idle governor changes nothing. State dicts are
    those of the unsplit optimizer: they load into it, and its state dicts load into this one (rates and other settings
    of a merged group are those of its first parameter).

    Args:
        optimizer: freshly built, before any scheduler: schedulers remember a base rate per group.

    Returns:
        The new groups' names, in order: the parameter's name where the optimizer was built from
        `model.named_parameters()`, else `group.index`.

    Raises:
        ValueError: a scheduler has been built on the optimizer, or it is split already.
    """
    groups = optimizer.param_groups
    if any("initial_lr" in group for group in groups):
        raise ValueError(
            "optimizer: a scheduler has been built on it, which remembers one rate per group; "
            "accepted: split_parameter_groups(optimizer) first, the scheduler afterwards"
        )
    if any("split_from" in group for group in groups):
        raise ValueError("optimizer: its groups are split already; accepted: an optimizer as it was built")
    split: list[dict[str, Any]] = []
    for index, group in enumerate(groups):
        names = group.get("param_names") or [f"{index}.{i}" for i in range(len(group["params"]))]
        for parameter, name in zip(group["params"], names):
            settings = {k: _own(v) for k, v in group.items() if k not in ("params", "param_names")}
            named = {"param_names": [name]} if "param_names" in group else {}
            split.append({"params": [parameter], **named, **settings, "split_from": index, "name": name})
    optimizer.param_groups[:] = split
    optimizer.register_state_dict_post_hook(_merged)
    optimizer.register_load_state_dict_pre_hook(_split_like)
    return [group["name"] for group in split]


def _own(value: Any) -> Any:
    """A tensor learning rate must not be shared between groups that are scaled apart."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def _merged(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    groups: dict[int, dict[str, Any]] = {}
    for group in state["param_groups"]:
        settings = {k: v for k, v in group.items() if k not in ("split_from", "name", "params", "param_names")}
        merged = groups.setdefault(group["split_from"], {**settings, "params": []})
        merged["params"] += group["params"]
        if "param_names" in group:
            merged.setdefault("param_names", []).extend(group["param_names"])
    return {**state, "param_groups": list(groups.values())}


def _split_like(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    if any("split_from" in group for group in state["param_groups"]):
        return state
    split: list[dict[str, Any]] = []
    for group in state["param_groups"]:
        names = group.get("param_names") or [None] * len(group["params"])
        for index, name in zip(group["params"], names):
            settings = {k: _own(v) for k, v in group.items() if k not in ("params", "param_names")}
            own = optimizer.param_groups[len(split)] if len(split) < len(optimizer.param_groups) else {}
            extra = {"split_from": own.get("split_from"), "name": own.get("name")}
            split.append({**settings, **({"param_names": [name]} if name else {}), **extra, "params": [index]})
    return {**state, "param_groups": split}
