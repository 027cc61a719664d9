"""What all ranks must agree on before the first step, checked on all of them at once."""

from collections.abc import Hashable
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def gather_values(value: Hashable) -> list[Any]:
    """``value`` of each rank, in the order of ranks; only this one's without a process group."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def broadcast_module_states(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0, as DDP does, so that shards are of one model."""
    for tensor in chain(module.parameters(), module.buffers()):
        if not tensor.is_meta:
            dist.broadcast(tensor, src=0)


def find_batch_norms(module: nn.Module) -> list[str]:
    """Names of the normalizations over the batch that see only their rank's share of it."""
    kinds = nn.modules.batchnorm._BatchNorm
    return [
        name
        for name, submodule in module.named_modules()
        if isinstance(submodule, kinds) and not isinstance(submodule, nn.SyncBatchNorm)
    ]
