"""Shards of shards: what FSDP2 cuts of what tensor parallelism has cut.

A tensor parallel part of a fused weight (queries, keys and values in one matrix) is a slice of each of its pieces,
``_StridedShard`` in DTensor's words. What FSDP2 then cuts of it has no placement that says it: ``full_tensor()`` of
the two together gives wrong values without an error (torch 2.13). So the cuts are undone in the order in which they
were made, the last first. ``_StridedShard`` is private to torch; tried with torch 2.11 to 2.13.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard


def whole_of_shards(value: DTensor) -> Tensor:
    """The whole of ``value``, on every rank of its mesh; all of them have to call this together.

    Args:
        value: A shard, a part, or on a mesh whose last dimension is the tensor group's, a shard of a part.
    """
    mesh, placements = value.device_mesh, value.placements
    if not _is_shard_of_part(placements):
        return _whole_of_part(value)
    outer, inner = _split_mesh(mesh)
    dimension: int = placements[-1].dim  # type: ignore[attr-defined]
    # Tensor parallelism deals out evenly.
    shape = torch.Size(n // inner.size() if d == dimension else n for d, n in enumerate(value.shape))
    shard = DTensor.from_local(
        value.to_local(), outer, _of_part(placements[:-1]), run_check=False, shape=shape, stride=_strides(shape)
    )
    part = DTensor.from_local(
        shard.full_tensor(), inner, placements[-1:], run_check=False, shape=value.shape, stride=value.stride()
    )
    return _whole_of_part(part)


def _whole_of_part(part: DTensor) -> Tensor:
    """By hand for slices of pieces, which torch 2.11 refuses to gather on a mesh where nothing else is cut."""
    placement = part.placements[-1]
    if not isinstance(placement, _StridedShard):
        return part.full_tensor()
    group = part.device_mesh.get_group(part.device_mesh.ndim - 1)
    local = part.to_local().detach().contiguous()
    locals_: list[Tensor] = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(locals_, local, group)
    slices = [each.chunk(int(placement.split_factor), placement.dim) for each in locals_]
    return torch.cat([each[piece] for piece in range(int(placement.split_factor)) for each in slices], placement.dim)


def shards_of_whole(value: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Cut ``value``, which every rank has whole, without communication.

    Args:
        value: The whole tensor.
        mesh: As of the shard that is wanted.
        placements: Likewise.
    """
    if not _is_shard_of_part(placements):
        return distribute_tensor(value, mesh, placements, src_data_rank=None)
    outer, inner = _split_mesh(mesh)
    part = distribute_tensor(value, inner, placements[-1:], src_data_rank=None).to_local()
    shard = distribute_tensor(part, outer, _of_part(placements[:-1]), src_data_rank=None).to_local()
    return DTensor.from_local(
        shard, mesh, placements, run_check=False, shape=value.shape, stride=_strides(value.shape)
    )


def _is_shard_of_part(placements: Sequence[Placement]) -> bool:
    *outer, inner = placements
    return isinstance(inner, Shard | _StridedShard) and not all(placement.is_replicate() for placement in outer)


def _split_mesh(mesh: DeviceMesh) -> tuple[DeviceMesh, DeviceMesh]:
    assert mesh.mesh_dim_names is not None
    *outer, inner = mesh.mesh_dim_names
    return mesh[tuple(outer)], mesh[inner]


def _of_part(placements: Sequence[Placement]) -> list[Placement]:
    """How FSDP2's cuts look from within the part: nothing is strided there."""
    return [Replicate() if p.is_replicate() else Shard(p.dim) for p in placements]  # type: ignore[attr-defined]


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides: list[Any] = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides[: len(shape)])
