"""Numbers that hooks compute from shards, such as norms of gradients, as they are on one device."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


class PlainScalars(TorchFunctionMode):
    """Within it, what torch computes from ``DTensor`` s and has no dimensions is a plain tensor, equal on all ranks.

    Scalars of several meshes, and of shards and replicated parameters, do not mix otherwise, nor can
    ``torch.tensor([norm, ...])`` read them. For the same reason lists of several kinds of tensors
    (``torch.nn.utils.clip_grad_norm_`` makes them) are computed with one by one. Communicates: all ranks of a mesh
    must compute the same.

    Example:
        >>> from lightning.pytorch.utilities import grad_norm
        >>> with PlainScalars():  # doctest: +SKIP
        ...     grad_norm(sharded_module, 2)
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_of_lists = getattr(func, "__name__", "").startswith("_foreach_")
        call = _one_by_one if is_of_lists and _are_of_several_kinds(args[0]) else _together
        return tree_map_only(DTensor, _plain_if_scalar, call(func, args, kwargs or {}))


def _are_of_several_kinds(tensors: Sequence[Tensor]) -> bool:
    return len({tensor.device_mesh if isinstance(tensor, DTensor) else None for tensor in tensors}) > 1


def _together(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _one_by_one(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    results: list[Any] = []
    for index in range(len(args[0])):
        own = [[arg[index]] if isinstance(arg, list | tuple) else arg for arg in args]
        results += func(*own, **kwargs) or ()
    return results or None


def _plain_if_scalar(tensor: DTensor) -> Any:
    return tensor if tensor.ndim else tensor.full_tensor()
