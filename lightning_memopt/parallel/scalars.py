"""Numbers that hooks compute from shards, such as norms of gradients, as they are on one device."""

from collections.abc import Callable
from typing import Any

from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


class PlainScalars(TorchFunctionMode):
    """Within it, what torch computes from ``DTensor`` s and has no dimensions is a plain tensor, equal on all ranks.

    Scalars of several meshes, and of shards and replicated parameters, do not mix otherwise, nor can
    ``torch.tensor([norm, ...])`` read them. Communicates: all ranks of a mesh must compute the same.

    Example:
        >>> from lightning.pytorch.utilities import grad_norm
        >>> with PlainScalars():  # doctest: +SKIP
        ...     grad_norm(sharded_module, 2)
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only(DTensor, _plain_if_scalar, func(*args, **(kwargs or {})))


def _plain_if_scalar(tensor: DTensor) -> Any:
    return tensor if tensor.ndim else tensor.full_tensor()
