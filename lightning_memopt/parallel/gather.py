"""Between shards and whole tensors: what a checkpoint holds has no trace of how many ranks wrote it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.optim import Optimizer


def full_on_cpu(value: Any, keep: bool = True) -> Any:
    """The whole of a sharded tensor, on the CPU; anything else as it is.

    Args:
        value: A ``DTensor`` is gathered: all ranks must call this for the same tensors in the same order.
        keep: Whether this rank wants the result; ``None`` in place of a sharded tensor otherwise.
    """
    if not isinstance(value, DTensor):
        return value
    # Offloaded shards lie in CPU memory, which NCCL cannot gather.
    on_mesh: Any = value.to(value.device_mesh.device_type)
    whole = on_mesh.full_tensor()
    return whole.cpu() if keep else None


def gather_module_state(module: nn.Module, keep: bool) -> dict[str, Any]:
    """The ``state_dict`` of ``module`` with whole tensors, tied ones gathered once and still tied.

    Args:
        module: A module with sharded parameters; the plain ones are taken as they are.
        keep: Whether this rank wants it (rank 0, which writes); an empty dict otherwise.
    """
    whole: dict[int, Any] = {}
    state = module.state_dict(keep_vars=True)  # the parameters themselves, so that tied ones are recognized
    for value in state.values():
        if isinstance(value, torch.Tensor) and id(value) not in whole:
            whole[id(value)] = full_on_cpu(value.detach(), keep)
    if not keep:
        return {}
    for name, value in state.items():
        state[name] = whole.get(id(value), value)
    return state


def gather_optimizer_state(optimizer: Optimizer, keep: bool) -> dict[str, Any]:
    """The ``state_dict`` of ``optimizer`` with whole tensors, as the same optimizer on one device would give it.

    Args:
        optimizer: An optimizer over sharded parameters.
        keep: Whether this rank wants it; an empty dict otherwise.
    """
    state_dict = optimizer.state_dict()
    state = {
        key: {name: full_on_cpu(value, keep) for name, value in entry.items()} if isinstance(entry, dict) else entry
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state} if keep else {}


def shard_module_state(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """Cut whole tensors the way the parameters of ``module`` are cut, without communication."""
    like = module.state_dict(keep_vars=True)
    return {name: _cut_like(value, like.get(name)) for name, value in state.items()}


def shard_optimizer_state(state_dict: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Cut a whole optimizer ``state_dict`` the way the parameters of ``optimizer`` are cut, without communication."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    like = dict(zip(keys, parameters, strict=True))
    state = {
        key: {name: _cut_like(value, like[key]) for name, value in entry.items()} if key in like else entry
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _cut_like(value: Any, like: Any) -> Any:
    if not isinstance(like, DTensor) or not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    # State of another shape than its parameter (Adafactor's row and column means) is whole on every rank.
    placements = like.placements if value.shape == like.shape else [Replicate()] * like.device_mesh.ndim
    value = value.to(like.device_mesh.device_type)
    cut = distribute_tensor(value, like.device_mesh, placements, src_data_rank=None)
    return cut.to(like.device)
