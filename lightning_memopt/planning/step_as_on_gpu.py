"""Let optimizers on fake tensors of a CPU step as they would on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook


@contextmanager
def step_as_on_gpu() -> Iterator[None]:
    """Within the block optimizers that leave it to PyTorch step all of their tensors at once.

    That is what they do on a GPU, and it takes temporaries as large as all tensors of a group
    (``torch.optim.optimizer._default_to_fused_or_foreach``); on a CPU they step one tensor after the other.
    """
    handle = register_optimizer_step_pre_hook(_step_together)
    try:
        yield
    finally:
        handle.remove()


def _step_together(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        has_tensor_rate = isinstance(group.get("lr"), torch.Tensor) and not group.get("capturable")
        is_open = group.get("foreach", False) is None and not group.get("fused")
        if is_open and not (has_tensor_rate or group.get("differentiable")):
            group["foreach"] = True
