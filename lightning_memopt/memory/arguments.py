"""The tensors among an operator's arguments: what every dispatch mode asks, at every call."""

from collections.abc import Iterator
from typing import Any

import torch


def tensor_arguments(args: Any, kwargs: Any) -> list[torch.Tensor]:
    """All tensors among the arguments of an operator, which holds them in lists at most.

    Quicker than torch's walk over trees of any kind, which took a part of every trace.
    """
    return [*_tensors(args), *_tensors(kwargs.values())] if kwargs else list(_tensors(args))


def tensor_results(result: Any) -> list[torch.Tensor]:
    """All tensors among what an operator returned."""
    return [result] if isinstance(result, torch.Tensor) else list(_tensors((result,)))


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
