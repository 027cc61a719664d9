"""What all ranks must agree on before the first step, checked on all of them at once."""

import hashlib
from collections.abc import Hashable
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

_PACKAGE = __name__.partition(".")[0]


def gather_values(value: Hashable) -> list[Any]:
    """``value`` of each rank, in the order of ranks; only this one's without a process group."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_same_module(module: nn.Module) -> None:
    """All ranks together: refuse a module that is another one on some rank.

    Raises:
        ValueError: Parameters or buffers differ in name, shape or type; names the first that does and its rank.
    """
    tensors = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    own = {name: f"{tuple(tensor.shape)} of {tensor.dtype}" for name, tensor in tensors}
    if len(set(gather_values(hashlib.sha256(repr(own).encode()).hexdigest()))) == 1:
        return
    first, *others = gather_values(tuple(own.items()))  # only now, since it is long
    for rank, other in enumerate(others, start=1):
        for name in dict(first) | dict(other):
            has = [dict(of).get(name) for of in (first, other)]
            if has[0] != has[1]:
                shown = [f"`{name}` is {shape}" if shape else f"there is no `{name}`" for shape in has]
                raise ValueError(
                    f"The ranks have different modules: on rank 0 {shown[0]}, on rank {rank} {shown[1]}. Build the "
                    "same module on all ranks, from the same arguments and not by rank."
                )
        if first != other:
            raise ValueError(
                f"The ranks have different modules: rank {rank} has the parameters of rank 0 in another order. Build "
                "the same module on all ranks."
            )


@torch.no_grad()
def broadcast_in_place(tensor: Tensor, src: int, group: dist.ProcessGroup | None = None) -> None:
    """Give every rank of ``group`` the values that the global rank ``src`` has; all of them together.

    Args:
        tensor: On any device, where NCCL takes those on GPUs alone, and of any strides and type.
        src: Whose values.
        group: All ranks by default.
    """
    devices = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]
    sent = tensor.detach().to(tensor.device if tensor.device.type in devices else devices[0]).contiguous()
    dist.broadcast(sent.view(-1).view(torch.uint8), src, group)  # NCCL does not know 16-bit integers
    if sent.data_ptr() != tensor.data_ptr() or sent.device != tensor.device:
        tensor.copy_(sent)


def check_buffers_are_apart(module: nn.Module) -> None:
    """Refuse a buffer that lies in the memory of a parameter that is trained, and would not follow its parts.

    Raises:
        ValueError: Names both.
    """
    trained = {p.untyped_storage()._cdata: (name, p) for name, p in module.named_parameters() if p.requires_grad}
    for name, buffer in module.named_buffers():
        of, parameter = trained.get(buffer.untyped_storage()._cdata, ("", buffer))
        own, theirs = _places(buffer), _places(parameter)
        if of and max(own.start, theirs.start) < min(own.stop, theirs.stop):
            raise ValueError(
                f"buffer `{name}` is a view of the parameter `{of}`, which each rank holds a part of, and would keep "
                "the values that it has now; compute it from the parameter in `forward`, or use `memopt_ddp`."
            )


def _places(tensor: Tensor) -> range:
    """From its first to its last element in its storage, in bytes."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first, size = tensor.storage_offset(), tensor.element_size()
    return range(first * size, (first + last + 1) * size)


def separate_elements(module: nn.Module) -> None:
    """Give buffers of which several elements are one in memory (``expand``) memory for each, to be written into.

    Example:
        >>> module = nn.Module()
        >>> module.register_buffer("mask", torch.ones(1).expand(4))
        >>> separate_elements(module)
        >>> module.mask.stride()
        (1,)
    """
    for buffer in module.buffers():
        if buffer.layout == torch.strided and any(
            step == 0 and size > 1 for step, size in zip(buffer.stride(), buffer.shape, strict=True)
        ):
            buffer.data = buffer.data.contiguous()


def broadcast_module_states(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0, as DDP does, so that shards are of one model."""
    for tensor in chain(module.parameters(), module.buffers()):
        if not tensor.is_meta:
            broadcast_in_place(tensor, src=0)


def find_batch_norms(module: nn.Module) -> list[str]:
    """Names of the normalizations with statistics of the batch that see only their rank's share of it."""
    return [
        name
        for name, submodule in module.named_modules()
        if takes_batch_statistics(submodule) and not isinstance(submodule, nn.SyncBatchNorm)
    ]


def takes_batch_statistics(module: nn.Module) -> bool:
    """Whether it normalizes by what it sees of the whole batch: now, or in evaluation, as instance norms may."""
    return isinstance(module, _BatchNorm) or (isinstance(module, _InstanceNorm) and module.track_running_stats)


def has_hooks(parameter: nn.Parameter) -> bool:
    """Whether users' hooks are called with its gradient; what takes the parameter's place does not have them."""
    hooked: Any = parameter
    hooks = (*(hooked._backward_hooks or {}).values(), *(hooked._post_accumulate_grad_hooks or {}).values())
    return any(not str(getattr(hook, "__module__", "")).startswith(f"{_PACKAGE}.") for hook in hooks)
