"""Between what each rank holds and whole tensors: a checkpoint has no trace of how many ranks wrote it, or how.

Three conventions make one code serve data, tensor and pipeline parallelism and their products. The module has its
whole structure on every rank, so names and orders agree. A ``DTensor`` is this rank's shard; a plain tensor is whole
on every rank that holds it. A tensor on the meta device is held by other ranks.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from lightning_memopt.parallel.agreement import broadcast_in_place, gather_values
from lightning_memopt.parallel.shards import shards_of_whole, whole_of_shards

WRITER = 0
"""The rank that gets what is gathered, and writes it."""


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
    whole = whole_of_shards(on_mesh)
    return whole.cpu() if keep else None


def find_owners(tensors: Iterable[Tensor]) -> list[int]:
    """The lowest rank that holds each tensor (not on the meta device); all ranks must call this together.

    A tensor that no rank holds is the writer's: a module that is built on the meta device and not yet materialized.
    """
    held = gather_values(tuple(not tensor.is_meta for tensor in tensors))
    return [next((rank for rank, holds in enumerate(ranks) if holds), WRITER) for ranks in zip(*held, strict=True)]


def gather_module_state(module: nn.Module, keep: bool) -> dict[str, Any]:
    """The ``state_dict`` of ``module`` with whole tensors, tied ones gathered once and still tied.

    Args:
        module: A module of which ranks hold shards or parts; what is plain and theirs is taken as it is.
        keep: Whether this rank wants it (the writer). Others get the same names, with the tensors that they have
            whole and the rest on the meta device: what the user's hooks do to names, types and shapes they can do on
            every rank, and to values where the module is whole, as after training.
    """
    state = module.state_dict(keep_vars=True)  # the parameters themselves, so that tied ones are recognized
    tensors = {id(value): value for value in state.values() if isinstance(value, Tensor)}
    whole = {
        key: _bring_to_writer(value.detach(), owner, keep)
        for (key, value), owner in zip(tensors.items(), find_owners(tensors.values()), strict=True)
    }
    if not keep:
        whole = {
            key: torch.empty(held.shape, dtype=held.dtype, device="meta")
            if isinstance(held, DTensor)
            else held.detach()
            for key, held in tensors.items()
        }
    for name, value in state.items():
        state[name] = whole.get(id(value), value)
    return state


def gather_optimizer_state(optimizer: Optimizer, keep: bool) -> dict[str, Any]:
    """The ``state_dict`` of ``optimizer`` with whole tensors, as the same optimizer on one device would give it.

    Args:
        optimizer: An optimizer over all of the model's parameters, sharded or held elsewhere as they may be.
        keep: Whether this rank wants it (the writer); the groups alone, without state, otherwise.
    """
    state_dict = optimizer.state_dict()
    parameters = _by_key(state_dict, optimizer)
    state = dict(state_dict["state"])
    for (key, _), owner in zip(parameters.items(), find_owners(parameters.values()), strict=True):
        entry = _bring_to_writer(state.get(key), owner, keep)
        if entry is not None:
            state[key] = entry
    state = {key: state[key] for key in [*parameters, *state] if key in state}  # as one device orders them
    return {**state_dict, "state": state if keep else {}}


def shard_module_state(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """Cut whole tensors the way the parameters of ``module`` are cut, without communication."""
    like = module.state_dict(keep_vars=True)
    return {name: cut_like(value, like.get(name)) for name, value in state.items()}


def shard_optimizer_state(state_dict: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Cut a whole optimizer ``state_dict`` the way the parameters of ``optimizer`` are cut, without communication."""
    like = _by_key(state_dict, optimizer)
    state = {
        key: {name: cut_like(value, like[key]) for name, value in entry.items()} if key in like else entry
        for key, entry in state_dict["state"].items()
        if key not in like or not like[key].is_meta
    }
    return {**state_dict, "state": state}


@torch.no_grad()
def complete_in_place(module: nn.Module) -> None:
    """Give every rank the values that only others hold: parameters and buffers on the meta device become whole.

    Shards must have been made whole before. All ranks must call this together. Tied parameters stay tied.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    tensors: dict[int, Tensor] = {}
    for submodule in module.modules():
        parameters = submodule.named_parameters(recurse=False, remove_duplicate=False)
        for name, tensor in chain(parameters, submodule.named_buffers(recurse=False, remove_duplicate=False)):
            places.setdefault(id(tensor), []).append((submodule, name))
            tensors[id(tensor)] = tensor
    held = gather_values(tuple(None if tensor.is_meta else tensor.shape for tensor in tensors.values()))
    device = next((t.device for t in tensors.values() if not t.is_meta), torch.device("cpu"))
    for (key, tensor), shapes in zip(tensors.items(), zip(*held, strict=True), strict=True):
        source, shape = next(((rank, shape) for rank, shape in enumerate(shapes) if shape is not None), (0, None))
        if shape is None or None not in shapes:
            continue
        value = torch.empty_like(tensor, device=device).detach() if tensor.is_meta else tensor.detach()
        if value.shape != shape:  # a buffer of which the step has made a longer one
            value = value.new_empty(shape)
        broadcast_in_place(value, source)
        if tensor.is_meta:
            whole: Any = value
            if isinstance(tensor, nn.Parameter):
                whole = nn.Parameter(value, requires_grad=tensor.requires_grad)
            for submodule, name in places[key]:
                setattr(submodule, name, whole)  # not `_parameters`: recurrent modules keep a list of their own


def _by_key(state_dict: Mapping[str, Any], optimizer: Optimizer) -> dict[Any, Tensor]:
    """The parameters of ``optimizer`` by the keys that ``state_dict`` has for them."""
    keys: Sequence[Any] = [key for group in state_dict["param_groups"] for key in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return dict(zip(keys, parameters, strict=True))


def _bring_to_writer(value: Any, owner: int, keep: bool) -> Any:
    """The whole of ``value`` where it is wanted, sent by its owner if that is not the writer.

    Args:
        value: A tensor, or a dict of them and of plain values; what this rank holds of it.
        owner: The lowest rank that holds it.
        keep: Whether this rank is the writer.
    """
    rank = dist.get_rank() if dist.is_initialized() else WRITER
    wanted = keep or (rank == owner != WRITER)
    if isinstance(value, dict):
        value = {name: full_on_cpu(part, wanted) for name, part in value.items()}
    elif value is not None and not value.is_meta:
        value = full_on_cpu(value, wanted)
    if owner == WRITER:
        return value
    if rank == owner:
        dist.send_object_list([_on_cpu(value)], dst=WRITER)
    elif rank == WRITER:
        received: list[Any] = [None]
        dist.recv_object_list(received, src=owner)
        return received[0]
    return value


def _on_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _on_cpu(part) for name, part in value.items()}
    return value.detach().cpu() if isinstance(value, Tensor) else value


def cut_like(value: Any, like: Any) -> Any:
    """What this rank holds of ``value``, which every rank has whole, by the measure of ``like``; no communication."""
    if isinstance(like, Tensor) and like.is_meta:
        return like  # loading it changes nothing
    if not isinstance(like, DTensor) or not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    # State of another shape than its parameter (Adafactor's row and column means) is whole on every rank.
    placements = like.placements if value.shape == like.shape else [Replicate()] * like.device_mesh.ndim
    return shards_of_whole(value.to(like.device_mesh.device_type), like.device_mesh, placements).to(like.device)
