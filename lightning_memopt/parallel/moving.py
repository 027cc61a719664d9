"""Move what a rank holds of a module that is taken apart to the device on which it computes."""

from itertools import chain

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def move_in_place(module: nn.Module, device: torch.device) -> None:
    """Move the parameters and buffers of ``module`` that are whole, one at a time; they stay the same objects.

    Shards, which may be offloaded, are where they were put, and what is on the meta device is held by other ranks.
    ``nn.Module.to`` would move the former and fail at the latter.

    Args:
        module: Of which ranks may hold shards or parts.
        device: Where to.

    Example:
        >>> move_in_place(nn.Linear(2, 2), torch.device("cpu"))
    """
    for tensor in chain(module.parameters(), module.buffers()):
        if not tensor.is_meta and not isinstance(tensor, DTensor) and tensor.device != device:
            tensor.data = tensor.data.to(device)
    for submodule in module.modules():
        if isinstance(submodule, nn.RNNBase) and not any(_is_part(p) for p in submodule.parameters()):
            submodule.flatten_parameters()  # cuDNN wants them in one piece


def _is_part(parameter: nn.Parameter) -> bool:
    return parameter.is_meta or isinstance(parameter, DTensor)
