"""Copy a module that keeps results of training as attributes."""

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_memopt.models.compiled import forget_compiled
from lightning_memopt.models.rebinding import rebind_functions

Module = TypeVar("Module", bound=nn.Module)


def copy_module(module: Module) -> Module:
    """A deep copy without the graph of tensors that were computed, and not compiled as a whole.

    Modules keep their last logits or a list of losses; torch refuses to copy such tensors. Parts that are wrapped by
    ``torch.compile`` are compiled in the copy too.

    Example:
        >>> module = nn.Linear(2, 2)
        >>> module.outputs = [module.weight.sum()]
        >>> copy_module(module).outputs[0].requires_grad
        False
    """
    copies: dict[int, Any] = {key: tensor.detach().clone() for key, tensor in _all_computed(module).items()}
    copied = copy.deepcopy(module, copies)
    forget_compiled(copied)
    rebind_functions(copied, copies)
    return copied


def check_copyable(module: nn.Module) -> None:
    """Raise where :func:`copy_module` would fail; parameters and buffers are not copied for it.

    Raises:
        ValueError: Something that the module holds cannot be copied.
    """
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    try:
        copy.deepcopy(module, {**_all_computed(module), **shared})
    except Exception as error:  # of whatever class an attribute is
        raise ValueError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}), and what is tried is tried "
            "on a copy. Keep locks, files, generators and the like out of its attributes, or out of a copy by "
            "__getstate__"
        ) from error


def _all_computed(module: nn.Module) -> dict[int, Any]:
    seen: set[int] = set()
    return {id(tensor): tensor for part in module.modules() for tensor in _computed(vars(part), seen)}


def _computed(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif isinstance(value, dict | list | tuple) and id(value) not in seen:  # they may hold themselves
        seen.add(id(value))
        for item in value.values() if isinstance(value, dict) else value:
            yield from _computed(item, seen)
