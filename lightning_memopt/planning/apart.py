"""Keep what a pipeline computes without data out of a prediction, which is made of tensors without data itself."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lightning_memopt.memory.arguments import tensor_arguments
from lightning_memopt.parallel.pipeline.stubs import is_stub


class StubsApart(TorchDispatchMode):
    """Runs operators on stubs as if no other dispatch mode were on: nobody counts them, and fakes do not mix.

    Enter it inside all modes but the tracker, which tells stubs by itself.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args)
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented
        kwargs = kwargs or {}
        stub: Any = next(filter(is_stub, tensor_arguments(args, kwargs)), None)
        if stub is None:
            return func(*args, **kwargs)
        with _disable_current_modes(), stub.fake_mode:
            return func(*args, **kwargs)
