"""Gradients that FSDP2 keeps whole until it reduces them: an adapter, since torch has no public call for them.

Reads private attributes of ``torch.distributed.fsdp._fully_shard``. Tried with torch 2.13; 2.11 has
them by the same names.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_memopt.parallel.unshard import parameter_groups


def unreduced_gradients(module: nn.Module) -> Iterator[Tensor]:
    """What backwards without gradient synchronization have left, which no parameter of ``module`` has as ``grad``.

    Args:
        module: Any; nothing comes of what is not sharded by FSDP2.
    """
    for parameter in _sharded_parameters(module):
        if parameter.unsharded_accumulated_grad is not None:  # of the type that gradients are reduced in
            yield parameter.unsharded_accumulated_grad
        whole = _whole(parameter)
        if whole is not None and whole.grad is not None:
            yield whole.grad


def drop_unreduced_gradients(module: nn.Module) -> None:
    """Forget them, as ``zero_grad`` does with those that parameters have."""
    for parameter in _sharded_parameters(module):
        parameter.unsharded_accumulated_grad = None
        whole = _whole(parameter)
        if whole is not None:
            whole.grad = None


def _sharded_parameters(module: nn.Module) -> Iterator[Any]:
    for submodule in module.modules():
        for group in parameter_groups(submodule) if isinstance(submodule, FSDPModule) else ():
            yield from group.fsdp_params


def _whole(parameter: Any) -> Tensor | None:
    whole: Tensor | None = getattr(parameter, "_unsharded_param", None)  # made when it is first gathered
    return whole
