"""One model on several ranks: replicated (DDP) or sharded (FSDP2), and its state as that of one process."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from lbw_rl.envs.ranks import Ranks
from lbw_rl.sample import is_sharded


def parallelise(
    model: torch.nn.Module, how: str, device: torch.device, ranks: Ranks
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Brings a model to its device, on every rank together.

    Weights must be the same on all ranks. With FSDP2 (Zhao et al. 2304.11277, per-parameter sharding) each decoder layer is
    gathered when it computes, and the rest of the model is one more group; frozen and trained weights of any types may be
    mixed. Weights keep their type; gradients of bfloat16 weights are averaged in float32.

    Args:
        model: on the CPU.
        how: "ddp" or "fsdp"; a process alone needs neither.
        device: of this rank.
        ranks: who trains it.

    Returns:
        The model that owns the weights, its parameters `DTensor`s under FSDP2; and the one to call for training.
    """
    if ranks.world == 1:
        model = model.to(device)
        return model, model
    if how == "fsdp":
        return (_sharded(model, device, ranks),) * 2
    model = model.to(device)
    ids = None if device.type == "cpu" else [device]
    return model, torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)


def _sharded(model: torch.nn.Module, device: torch.device, ranks: Ranks) -> torch.nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (ranks.world,))
    narrow = any(p.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if narrow else None)
    layers = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    # Moved to the device group by group: no GPU need hold the whole model.
    for module in list(model.modules()):
        if type(module).__name__ in layers and module is not model:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def averaged_when(complete: bool, forward: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    """The passes of one micro-batch: DDP need not average over ranks what is only a part of the gradient.

    FSDP2 does all the same, since unsharded gradients of the whole model would have to wait on every rank.

    Args:
        complete: whether it is the step's last.
        forward: the model to call for training.
    """
    if complete or not isinstance(forward, torch.nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return forward.no_sync()


def reshard(model: torch.nn.Module) -> None:
    """After an evaluation: FSDP2 keeps the outermost group gathered, as if a backward pass would follow."""
    again = getattr(model, "reshard", None)
    if callable(again):
        again()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A `DTensor` as the whole tensor, on every rank; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a `DTensor`; any other as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole_state(state: Any, ranks: Ranks) -> Any:
    """A state dict as one process would have it: its `DTensor`s put together on the first rank's host, one at a time.

    Args:
        state: nested mappings, lists and tuples; all ranks call with theirs.
        ranks: who shares the tensors.

    Returns:
        The same nesting; on the other ranks with None in place of what they have given.
    """
    if is_sharded(state):
        full = state.detach().full_tensor()
        return full.cpu() if ranks.leads else None
    if isinstance(state, Mapping):
        return {key: whole_state(value, ranks) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole_state(value, ranks) for value in state)
    return state


def whole_weights(weights: Mapping[str, Any], model: torch.nn.Module, ranks: Ranks) -> dict[str, Any]:
    """`whole_state` of a model's weights by name, all or some, in which tied ones are one tensor as they are in the model."""
    first: dict[int, str] = {}
    tied = {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    gathered = whole_state({name: t for name, t in weights.items() if tied.get(name, name) == name}, ranks)
    return {name: gathered[tied.get(name, name)] for name in weights}


def sharded_state(state: Mapping[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The inverse of `whole_state` for what `TrainingTask.state_dict` holds, whatever number of ranks saved it.

    Args:
        state: with "model" (name → tensor) and "optimizer" (its state dict), whole, on every rank.
        model: whose weights tell how to cut; nothing is written to it.
        optimizer: over them.
    """
    live = model.state_dict()
    weights = {name: _like(value, live.get(name)) for name, value in state["model"].items()}
    # Numbers in an optimizer's state dict count its parameters, group after group.
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        index: {key: _like(value, owned[index] if index < len(owned) else None) for key, value in own.items()}
        for index, own in state["optimizer"]["state"].items()
    }
    return {**state, "model": weights, "optimizer": {**state["optimizer"], "state": moments}}


def _like(value: Any, owner: Any) -> Any:
    """`value` cut as its owner is, where it is an element-wise companion of a sharded tensor."""
    if not is_sharded(owner) or not isinstance(value, torch.Tensor) or value.shape != owner.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(owner.device), owner.device_mesh, owner.placements)
