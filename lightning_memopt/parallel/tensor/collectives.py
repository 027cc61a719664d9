"""What tensor parallel layers say to each other: each a redistribution of DTensor's, plain tensors in and out.

Every function has a forward and the backward that belongs to it; Shoeybi et al., "Megatron-LM"
(https://arxiv.org/abs/1909.08053) call the first two *f* and *g*.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from lightning_memopt.parallel.local import own
from lightning_memopt.parallel.refusal import StepRefused


def enter(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """``x`` itself, for work on a part of the features: its gradients of all ranks are added up.

    Args:
        x: The same on all ranks of ``mesh``.
        mesh: The tensor group.
    """
    x = _once_differentiable(x)
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def add_up(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of all ranks' ``x``, the same on all of them, and so is its gradient."""
    return own(_to_all(DTensor.from_local(x, mesh, [Partial()], run_check=False)))


def gather(x: Tensor, mesh: DeviceMesh, dimension: int = -1, pieces: int = 1) -> Tensor:
    """Put the ranks' parts of a dimension together; the gradient is taken apart again.

    Args:
        x: This rank's part, ``size / N`` long in ``dimension``.
        mesh: The tensor group, of N ranks.
        dimension: Which dimension was dealt out.
        pieces: Equal parts of the dimension, of each of which a rank has its own part.
    """
    dimension = dimension % x.ndim
    parted = x.unflatten(dimension, (pieces, -1))
    whole = _to_all(DTensor.from_local(parted, mesh, [Shard(dimension + 1)], run_check=False))
    return own(whole.flatten(dimension, dimension + 1))


def take_part(x: Tensor, mesh: DeviceMesh, dimension: int = -1) -> Tensor:
    """This rank's part of a dimension of ``x``, which is the same on all ranks; the gradient is gathered."""
    whole = DTensor.from_local(_once_differentiable(x), mesh, [Replicate()], run_check=False)
    return whole.redistribute(placements=[Shard(dimension % x.ndim)]).to_local()


def gather_tokens(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """All tokens ``(batch, tokens, features)``, for work on a part of the features; of their gradients, summed over
    the ranks, each rank gets those of its own tokens."""
    parts = DTensor.from_local(x, mesh, [Shard(1)], run_check=False)
    return parts.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def add_up_tokens(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Of the sum of all ranks' ``x`` ``(batch, tokens, features)`` this rank's tokens; their gradient is gathered."""
    total = DTensor.from_local(x, mesh, [Partial()], run_check=False)
    return own(total.redistribute(placements=[Shard(1)]).to_local())


def part_of(x: Tensor, rank: int, size: int, dimension: int = -1, pieces: int = 1) -> Tensor:
    """The view that :func:`gather` on all ranks would put together to ``x``, without a backward of its own."""
    dimension = dimension % x.ndim
    parted = x.unflatten(dimension, (pieces, -1))
    return parted.chunk(size, dimension + 1)[rank].flatten(dimension, dimension + 1)


def _to_all(x: DTensor) -> Tensor:
    return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise StepRefused(
                "the step differentiates a gradient (`torch.autograd.grad(..., create_graph=True)`, as a gradient "
                "penalty does), and what split layers add up over ranks in a backward has no second one; use "
                "`memopt_zero3`."
            )
        return gradient


def _once_differentiable(x: Tensor) -> Tensor:
    """``x``, refusing a backward of its backward, which DTensor computes wrongly and without a word."""
    result: Tensor = _OnceDifferentiable.apply(x) if x.requires_grad else x
    return result
