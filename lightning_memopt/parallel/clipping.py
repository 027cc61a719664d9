"""Clip gradients of which each rank may hold all, a shard, or none: the norm is that of the whole model."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate


def local_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """What this rank holds of each gradient, as plain tensors that share its memory.

    A gradient that is still a sum over ranks (``Partial``) is added up first, in place of the pending one.
    """
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        _add_up(parameter)
        gradient = parameter.grad
        gradients.append(gradient.to_local() if isinstance(gradient, DTensor) else gradient)
    return gradients


@torch.no_grad()
def gradient_norm(
    parameters: Sequence[nn.Parameter],
    norm_type: float = 2.0,
    *,
    stages: dist.ProcessGroup | None = None,
    counts: Callable[[nn.Parameter], bool] | None = None,
) -> Tensor:
    """The norm of all gradients of the model, as one device would compute it.

    Args:
        parameters: This rank's parameters: plain (replicated) ones, shards on any mesh, and ones without gradient.
        norm_type: The order p of the norm; ``inf`` for the largest element.
        stages: The ranks that hold the model's other parameters (pipeline stages).
        counts: Whether a parameter counts on this rank, for one that several stages hold.

    Returns:
        The norm, a scalar in float32 (float64 if a gradient is), equal on all ranks.

    Source: ``torch.nn.utils.get_total_norm``, which takes neither gradients of several meshes nor of other stages.
    """
    device = next((p.device for p in parameters if not p.is_meta), torch.device("cpu"))
    dtype = torch.float32
    by_reduction: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is None:
            continue
        _add_up(parameter)
        gradient = parameter.grad
        if gradient.dtype == torch.float64:
            dtype = torch.float64
        if counts is not None and not counts(parameter):
            continue
        if isinstance(gradient, DTensor):
            by_reduction[_groups_of_shards(gradient)].append(gradient.to_local())
        else:
            by_reduction[()].append(gradient)
    total = torch.zeros((), device=device, dtype=dtype)
    is_largest = math.isinf(norm_type)
    operation = dist.ReduceOp.MAX if is_largest else dist.ReduceOp.SUM
    # In one order on all ranks that share a group: every rank meets the parameters in the model's order.
    for groups, gradients in by_reduction.items():
        part = _power_sum(gradients, norm_type, device, dtype)
        for group in groups:
            dist.all_reduce(part, operation, group)
        total = torch.maximum(total, part) if is_largest else total + part
    if stages is not None:
        dist.all_reduce(total, operation, stages)
    return total if is_largest else total ** (1.0 / norm_type)


@torch.no_grad()
def clip_by_norm(
    parameters: Sequence[nn.Parameter],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    stages: dist.ProcessGroup | None = None,
    counts: Callable[[nn.Parameter], bool] | None = None,
) -> Tensor:
    """Scale all gradients so that their norm is at most ``max_norm``, and return what it was.

    Args:
        parameters: See :func:`gradient_norm`, as for the others.
        max_norm: The largest norm allowed.
        norm_type: See :func:`gradient_norm`.
        stages: See :func:`gradient_norm`.
        counts: See :func:`gradient_norm`.
    """
    norm = gradient_norm(parameters, norm_type, stages=stages, counts=counts)
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grads_with_norm_
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    for gradient in local_gradients(parameters):
        by_device[gradient.device].append(gradient)
    for device, gradients in by_device.items():
        torch._foreach_mul_(gradients, factor.to(device))
    return norm


@torch.no_grad()
def clip_by_value(parameters: Iterable[Tensor], max_value: float) -> None:
    """Bring each element of each gradient into ``[-max_value, max_value]``."""
    for gradient in local_gradients(parameters):
        gradient.clamp_(-max_value, max_value)


def _add_up(parameter: Tensor) -> None:
    gradient = parameter.grad
    if isinstance(gradient, DTensor) and any(isinstance(placement, Partial) for placement in gradient.placements):
        placements = [Replicate() if isinstance(p, Partial) else p for p in gradient.placements]
        parameter.grad = gradient.redistribute(placements=placements)


def _groups_of_shards(gradient: DTensor) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which this gradient's shards together are the whole."""
    mesh = gradient.device_mesh
    return tuple(
        mesh.get_group(dimension)
        for dimension, placement in enumerate(gradient.placements)
        # FSDP2 over a column-parallel weight is a strided shard, which does not call itself a shard.
        if not placement.is_replicate() and mesh.size(dimension) > 1
    )


def _power_sum(gradients: list[Tensor], norm_type: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sum over elements of ``|g|^p``, or the largest ``|g|``."""
    norm = torch.nn.utils.get_total_norm([g for g in gradients if g.numel()], norm_type).to(device, dtype)
    return norm if math.isinf(norm_type) else norm**norm_type
