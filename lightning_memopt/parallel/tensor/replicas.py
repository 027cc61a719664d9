"""What every rank of a tensor group must hold alike: batches, random numbers, and whole parameters."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

DRIFT = 1e-3
"""Relative difference between replicas above which something else than rounding is at work."""


def share_random_state(mesh: DeviceMesh) -> None:
    """Give all ranks of a tensor group the random state of its first, so that they drop out the same activations."""
    on_cuda = mesh.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device(mesh.device_type)
    group, first = mesh.get_group(), int(mesh.mesh.flatten()[0])
    state = torch.get_rng_state().to(device)
    dist.broadcast(state, src=first, group=group)
    torch.set_rng_state(state.cpu())
    if on_cuda:
        state = torch.cuda.get_rng_state(device).to(device)
        dist.broadcast(state, src=first, group=group)
        torch.cuda.set_rng_state(state.cpu(), device)


def have_same_batch(batch: Any, mesh: DeviceMesh) -> bool:
    """Whether all ranks of a tensor group were given the same batch, as far as sums and shapes tell."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    mine = [(tuple(t.shape), float(t.double().nan_to_num().sum())) for t in tensors]
    theirs: list[Any] = [None] * mesh.size()
    dist.all_gather_object(theirs, mine, group=mesh.get_group())
    return all(other == mine for other in theirs)


@torch.no_grad()
def check_replicas(module: nn.Module, mesh: DeviceMesh) -> None:
    """Compare the whole parameters of a tensor group's ranks, and take rounding differences out of them.

    Their gradients are computed alike on all ranks, but kernels that add in no fixed order (an embedding's backward
    on a GPU) can let them drift apart, bit by bit. All ranks of the group must call this together.

    Args:
        module: A module that is split over ``mesh``; parameters that are not are compared.
        mesh: The tensor group.

    Raises:
        RuntimeError: Replicas differ by more than rounding explains; names the parameter that differs most.
    """
    named = ((name, _held_alike(parameter, mesh)) for name, parameter in module.named_parameters())
    replicated = {name: tensor for name, tensor in named if tensor is not None}
    if not replicated:
        return
    sums = torch.stack([torch.stack([p.double().sum(), p.double().square().sum()]) for p in replicated.values()])
    sums = sums.to(mesh.device_type)
    least, most = sums.clone(), sums.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN, mesh.get_group())
    dist.all_reduce(most, dist.ReduceOp.MAX, mesh.get_group())
    gaps = ((most - least)[:, 1] / most[:, 1].clamp_min(1e-30)).nan_to_num(0.0)  # not finite anywhere: no drift
    worst = int(gaps.argmax())
    if gaps[worst] > DRIFT:
        name = list(replicated)[worst]
        raise RuntimeError(
            f"Parameter `{name}`, of which every rank of a tensor group holds a replica, differs among them by "
            f"{float(gaps[worst]):.1e} (relative, of its square sum): its gradients were not the same. Something in "
            "the step depends on the rank (other batches, other random numbers); find it, or split less "
            f"(plan={{{name.rpartition('.')[0]!r}: 'whole'}})."
        )
    for parameter, same in zip(replicated.values(), (most == least).all(1), strict=True):
        if not bool(same):
            dist.broadcast(parameter, src=int(mesh.mesh.flatten()[0]), group=mesh.get_group())


def _held_alike(parameter: nn.Parameter, mesh: DeviceMesh) -> Tensor | None:
    """What the ranks of a tensor group hold alike of a parameter: all of it, the same shard of it, or nothing."""
    if parameter.is_meta:
        return None
    if not isinstance(parameter, DTensor):
        return parameter.detach()
    assert mesh.mesh_dim_names is not None
    is_split = mesh.mesh_dim_names[0] in (parameter.device_mesh.mesh_dim_names or ())
    return None if is_split else parameter.to_local().detach()
