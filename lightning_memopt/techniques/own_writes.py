"""Notice that a training step writes to tensors of its module, as one with a teacher or a running average does."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy


class OwnWrites:
    """Tells which parameters of ``module`` are other than they were here.

    Args:
        module: The module about to be run.
        thoroughly: Look at buffers too, but for those of batch normalization, and at the values of what is not
            trained, in one pass over it: ``parameter.data.mul_()`` leaves no other trace.

    Example:
        >>> net = nn.Linear(2, 2).requires_grad_(False)
        >>> writes = OwnWrites(net, thoroughly=True)
        >>> _ = net.bias.data.add_(1)
        >>> writes.names()
        ['bias']
    """

    def __init__(self, module: nn.Module, thoroughly: bool) -> None:
        self._module = module
        self._thoroughly = thoroughly
        self._before = self._look()

    def names(self) -> list[str]:
        """Qualified names of what was written to since."""
        now = self._look()
        return [name for name, seen in self._before.items() if now.get(name, seen) != seen]

    @torch.no_grad()
    def _look(self) -> dict[str, tuple[float | None, ...]]:
        tensors: dict[str, Tensor] = dict(self._module.named_parameters())
        if self._thoroughly:
            tensors |= {
                f"{path}.{name}" if path else name: buffer
                for path, owner in self._module.named_modules()
                if not isinstance(owner, _NormBase)
                for name, buffer in owner.named_buffers(recurse=False)
            }
        tensors = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta and not is_lazy(tensor)}
        seen: dict[str, tuple[float | None, ...]] = {
            name: (tensor._version, tensor.data_ptr()) for name, tensor in tensors.items()
        }
        still = [name for name, tensor in tensors.items() if not tensor.requires_grad and _can_be_summed(tensor)]
        if self._thoroughly and still:
            sums = torch.stack([_summed(tensors[name]) for name in still]).tolist()
            for name, total in zip(still, sums, strict=True):
                seen[name] += (total if total == total else None,)  # not a number is equal to none
        return seen


def _can_be_summed(tensor: Tensor) -> bool:
    """Not the tensors of quantization libraries, nor 8-bit floats."""
    is_plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout is torch.strided
    return is_plain and not tensor.is_quantized and (tensor.itemsize > 1 or not tensor.is_floating_point())


def _summed(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).sum().float()
