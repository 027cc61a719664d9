"""fp16's loss scale where ranks hold different gradients: an overflow anywhere skips the step everywhere.

Adapter for ``torch.amp.GradScaler._unscale_grads_``, which FSDP1's own scaler overrides too; torch 2.11 to 2.13.
"""

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_memopt.parallel.clipping import local_gradients


def unscale_on_all_ranks(
    optimizer: torch.optim.Optimizer, inverse_scale: Tensor, found_inf: Tensor, allow_fp16: bool
) -> dict[torch.device, Tensor]:
    """In place of the scaler's own method: unscale what this rank holds, and agree with all ranks on overflows.

    The method of torch takes no plain gradients beside sharded ones, and asks this rank alone.

    Args:
        optimizer: Its parameters' gradients are unscaled in place.
        inverse_scale: A float32 scalar.
        found_inf: A float32 zero.
        allow_fp16: Whether gradients may be float16.

    Returns:
        By device, whether a gradient of any rank is not finite: 1.0 or 0.0.

    Raises:
        ValueError: float16 gradients where they are not allowed.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for gradient in local_gradients(p for group in optimizer.param_groups for p in group["params"]):
        if gradient.dtype == torch.float16 and not allow_fp16:
            raise ValueError("Attempting to unscale FP16 gradients.")
        by_kind[gradient.device, gradient.dtype].append(gradient)
    found: dict[torch.device, Tensor] = {found_inf.device: found_inf.clone()}
    for (device, _), gradients in by_kind.items():
        overflowed = found.setdefault(device, found_inf.to(device))
        unscale: Any = torch._amp_foreach_non_finite_check_and_unscale_
        unscale(gradients, overflowed, inverse_scale.to(device))
    anywhere = torch.stack([value.to(found_inf.device) for value in found.values()]).max()
    dist.all_reduce(anywhere, dist.ReduceOp.MAX)
    return {device: anywhere.to(device) for device in found}
