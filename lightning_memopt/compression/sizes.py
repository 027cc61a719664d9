"""How many bytes a module holds, and how many of its weights are zero, whatever its tensors are made of."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_memopt.compression.codecs import encode
from lightning_memopt.compression.packed import PackedWeight


@dataclass(frozen=True)
class ModuleSize:
    """What one module holds itself, without its children.

    Attributes:
        kind: Name of its class.
        bytes: In memory: parameters and buffers, with the scales and codes of quantized ones.
        disk_bytes: As :func:`~lightning_memopt.compression.codecs.encode` packs what belongs to the ``state_dict``.
        weights: How many weights there are, those of no parameter left out.
        zeros: How many of them are zero.
    """

    kind: str
    bytes: int
    disk_bytes: int
    weights: int
    zeros: int


ModuleSizes = Mapping[str, ModuleSize]
"""Sizes by qualified name of the module, ``""`` for the root; modules that hold no tensor are left out."""


def measure_sizes(module: nn.Module, *, packed: bool = True) -> ModuleSizes:
    """Measure each module below ``module``; a tensor that is held twice (tied weights) counts where it comes first.

    Args:
        module: Any module; it is only read.
        packed: Whether ``disk_bytes`` are those of the packed form. ``False`` is what a plain ``state_dict`` on disk
            takes, and quicker.

    Example:
        >>> measure_sizes(nn.Sequential(nn.Linear(4, 2)))["0"].bytes
        40
    """
    seen: set[int] = set()
    sizes = {}
    for name, child in module.named_modules():
        held = memory = disk = weights = zeros = 0
        for key, tensor in (*child._parameters.items(), *child._buffers.items()):
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            held += 1
            parts = list(plain_parts(tensor))
            memory += tensor.held_bytes if isinstance(tensor, PackedWeight) else sum(part.nbytes for part in parts)
            if key not in child._non_persistent_buffers_set:
                disk += sum(encoded_bytes(part) if packed else part.nbytes for part in parts)
            if key in child._parameters:
                values = plain_values(tensor)
                weights += values.numel()
                zeros += values.numel() - int(torch.count_nonzero(values))
        if held:
            sizes[name] = ModuleSize(type(child).__name__, memory, disk, weights, zeros)
    return sizes


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that ``tensor`` is made of: itself, or the values, scales and codes of a quantized one."""
    if isinstance(tensor, PackedWeight):
        yield from tensor.plain().file_parts().values()
        return
    if is_traceable_wrapper_subclass(tensor):  # torchao's
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_parts(getattr(tensor, name))
        return
    yield tensor
    state = getattr(tensor, "quant_state", None)  # bitsandbytes' 4-bit parameters
    if state is not None:
        yield from (part for part in state.as_dict().values() if isinstance(part, Tensor))


def plain_values(tensor: Tensor) -> Tensor:
    """The numbers that ``tensor`` stands for, as a plain tensor."""
    state = getattr(tensor, "quant_state", None)  # which `detach` loses
    tensor = tensor.detach()
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(tensor, state)
    return tensor.dequantize() if is_traceable_wrapper_subclass(tensor) else tensor


def encoded_bytes(tensor: Tensor) -> int:
    """Bytes of the smallest exact encoding of a plain tensor."""
    return sum(part.nbytes for part in encode(tensor.detach()).tensors.values())
