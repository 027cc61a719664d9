"""What ranks with different batches computed from them, on each of those ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_batches(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks, ``(ranks, *shape)``; each rank's gets its gradients, summed over all of them.

    ``torch.distributed.nn.functional.all_gather`` takes the numbers of ranks in a group for those in the world in its
    backward over gloo (torch 2.11 to 2.13).

    Args:
        tensor: Of the same shape and type on all ranks.
        group: The ranks, all of which must call this and its backward together.
    """
    gathered: Tensor = _Gather.apply(tensor.contiguous(), group)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor, group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)], None
