"""Batch normalization over the batches of several ranks on CPUs, where torch's ``SyncBatchNorm`` does not run."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def synchronized_batch_norms(module: nn.Module, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Within the block batch norms of ``module`` that train normalize over the batches of all ranks of ``group``.

    Ranks may have unequally many samples. The norms get a subclass of their class and keep all else.

    Args:
        module: Any module; all ranks of the group have the same, and call its norms in the same order.
        group: Ranks that have different batches; ``None`` is all.

    Source:
        ``torch.nn.SyncBatchNorm``, whose numbers these are.
    """
    classes: dict[type, type] = {}
    with ExitStack() as undo:
        for norm in module.modules():
            cls = type(norm)
            # Instance norms, which are batch norms to torch, take statistics of a sample alone.
            if not isinstance(norm, _BatchNorm) or isinstance(norm, nn.modules.instancenorm._InstanceNorm):
                continue
            if cls not in classes:
                classes[cls] = type(cls.__name__, (cls,), {"forward": _forward_over(group, cls.forward)})
            norm.__class__ = classes[cls]
            undo.callback(setattr, norm, "__class__", cls)
        yield


def _forward_over(group: dist.ProcessGroup | None, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(norm: _BatchNorm, x: Tensor) -> Tensor:
        if not norm.training or isinstance(x, FakeTensor):  # which runs on one rank, to learn its shape
            return own(norm, x)
        norm._check_input_dim(x)
        mean, variance, count = _statistics(x, group)
        _track(norm, mean.detach(), variance.detach(), count)
        shape = (1, -1, *[1] * (x.ndim - 2))
        scale = torch.rsqrt(variance + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight
        output = (x - mean.view(shape)) * scale.view(shape)
        return (output if norm.bias is None else output + norm.bias.view(shape)).to(x.dtype)

    return forward


class _SumOverRanks(torch.autograd.Function):
    """As the deprecated ``torch.distributed.nn.functional.all_reduce``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _statistics(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each channel over all ranks, and how many values each is of."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    channels = wide.transpose(0, 1).flatten(1)
    sums = torch.cat([channels.sum(1), wide.new_tensor([channels.shape[1]])])
    *_, count = sums = _SumOverRanks.apply(sums, group)
    mean = sums[:-1] / count
    # In two passes, as a difference of large sums would lose digits.
    squares = _SumOverRanks.apply((channels - mean[:, None]).square().sum(1), group)
    return mean, squares / count, count.detach()


@torch.no_grad()
def _track(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked.add_(1)
    momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    unbiased = variance * count / (count - 1)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
