"""What a rank holds of a sharded tensor, as a plain tensor, and the way back."""

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
