"""Copies of modules and batches made of fake tensors, which have everything but bytes."""

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torchmetrics import Metric

from lightning_memopt.models.compiled import forget_compiled
from lightning_memopt.planning.known_values import stays_real
from lightning_memopt.techniques.batches import tensors_in


def fake_copy(mode: FakeTensorMode, original: Any) -> Any:
    """A deep copy whose tensors are fakes of ``mode`` on the CPU; tensors on meta and other fakes are welcome.

    What :func:`~lightning_memopt.planning.known_values.stays_real` keeps is copied for real.
    """
    memo: dict[int, Any] = {}
    for tensor in tensors_of(original):
        if stays_real(tensor):
            memo[id(tensor)] = tensor.clone().cpu()
        elif tensor.device.type != "cpu" or isinstance(tensor, FakeTensor):
            memo[id(tensor)] = _fake_like(mode, tensor)
    with FakeCopyMode(mode):
        return copy.deepcopy(original, memo)


def adapt(module: pl.LightningModule) -> None:
    """Make up on this copy for what fake tensors cannot do.

    ``self.log`` reads values and ``self.cpu`` moves bytes: they do nothing. ``.to(dtype)`` and the like swap the
    parameters of a fake module, which PyTorch refuses for parameters that anybody else looks at.
    """

    def ignore(*args: Any, **kwargs: Any) -> None:
        pass

    forget_compiled(module)
    module.log = module.log_dict = ignore  # type: ignore[method-assign]
    module.cpu = ignore  # type: ignore[assignment,method-assign]
    for submodule in module.modules():
        submodule._apply = MethodType(_apply_in_place, submodule)  # type: ignore[method-assign]


def _apply_in_place(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """``nn.Module._apply`` for fake tensors: parameters stay the same objects, and tied ones tied."""
    with torch.no_grad():
        for parameter in module.parameters(recurse):
            for tensor in (parameter, parameter.grad):
                if tensor is not None:
                    tensor.data = function(tensor.data)
        for each in module.modules() if recurse else (module,):
            for name, buffer in each._buffers.items():
                if buffer is not None:
                    each._buffers[name] = function(buffer)
    return module


def silence_metrics(module: nn.Module) -> list[str]:
    """Replace torchmetrics objects on this copy, which check values; gives their names."""
    names = []
    for name, metric in module.named_modules():
        if isinstance(metric, Metric):
            metric.forward = metric.update = metric.compute = _zero  # type: ignore[assignment,method-assign]
            names.append(name)
    return names


def _zero(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(())


def tensors_of(original: Any) -> list[torch.Tensor]:
    """The parameters and buffers of a module, or the tensors in a batch."""
    if isinstance(original, nn.Module):
        return [*original.parameters(), *original.buffers()]
    return tensors_in(original)


def _fake_like(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    make: Callable[..., Any] = torch.empty_strided
    with mode:
        fake = make(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad)
