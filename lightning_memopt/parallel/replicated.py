"""Parameters that are whole on every rank beside shards: scalars, which have nothing that could be cut."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh


def find_scalars(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``module`` without dimensions, as CLIP's temperature."""
    return [parameter for parameter in module.parameters() if parameter.ndim == 0]


def average_gradients(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> list[Callable[[], Any]]:
    """Have each backward pass average the gradients of ``parameters`` over ``mesh``, as FSDP2 does those of shards.

    What was accumulated and averaged before is the same on all ranks, and so stays what it is. Those that are frozen
    may be trained later.

    Returns:
        What takes the hooks off again.
    """
    removals = []
    for parameter in [parameter for parameter in parameters if not parameter.is_meta]:
        is_trained = parameter.requires_grad
        parameter.requires_grad_(True)  # torch hooks no other
        removals.append(parameter.register_post_accumulate_grad_hook(partial(_average, mesh)).remove)
        parameter.requires_grad_(is_trained)
    return removals


@torch.no_grad()
def _average(mesh: DeviceMesh, parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    for dimension in range(mesh.ndim):
        dist.all_reduce(parameter.grad, group=mesh.get_group(dimension))
    parameter.grad.div_(mesh.size())
