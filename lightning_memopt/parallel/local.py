"""Plain tensors of a rank's own: what it holds of a sharded one, and what it got from others."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_of(tensor: Tensor) -> Tensor:
    """The memory of this rank's shard of ``tensor``, or ``tensor`` itself where it is whole."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def local_gradient(parameter: Tensor) -> Tensor:
    """The gradient of what this rank holds of ``parameter``."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
    return local_of(gradient)


def like_shard(local: Tensor, parameter: Tensor) -> Tensor:
    """``local``, of the shape of this rank's shard of ``parameter``, as a shard; as it is where that is whole."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient


def own(x: Tensor) -> Tensor:
    """``x`` as something that was computed, for code that may change it in place (Falcon's ``mlp_output += ...``).

    What comes out of a ``DTensor`` is a view, and what a stage receives a leaf: autograd lets nobody write to either.
    """
    result: Tensor = _Own.apply(x)
    return result
