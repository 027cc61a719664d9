"""Observe how large the inputs are that quantized layers round."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memopt.compression.packed.integers import FEWEST
from lightning_memopt.models.compiled import run_uncompiled
from lightning_memopt.models.linears import read_linear

Range = tuple[float, float]
"""The smallest and the largest input; 0 is between them, since it must stay 0."""


def input_range(x: Tensor) -> Range:
    """The range of ``x``; of what is finite in it, since no steps are between others."""
    low, high = map(float, x.detach().aminmax())
    if not math.isfinite(high - low):
        x = x.detach()[torch.isfinite(x.detach())]
        low, high = map(float, x.aminmax()) if x.numel() else (0.0, 0.0)
    return min(low, 0.0), max(high, 0.0)


def joined(one: Range | None, other: Range) -> Range:
    """The range of both."""
    return other if one is None else (min(one[0], other[0]), max(one[1], other[1]))


@contextmanager
def observe_inputs(module: nn.Module) -> Iterator[dict[str, Range]]:
    """Collect, while the block runs, between which numbers the inputs of layers below ``module`` are.

    Yields:
        By qualified name of the layer; filled as layers are called.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> with observe_inputs(net) as ranges:
        ...     _ = net(torch.tensor([[0.5, -3.0]]))
        >>> ranges
        {'0': (-3.0, 0.5)}
    """
    ranges: dict[str, Range] = {}
    handles = []
    for name, layer in module.named_modules():
        if sample_dims(layer) is None and not isinstance(layer, nn.MultiheadAttention):
            continue

        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str = name) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(x, Tensor) and x.numel():
                ranges[name] = joined(ranges.get(name), input_range(x))

        handles.append(layer.register_forward_pre_hook(observe, with_kwargs=True))
    try:
        with run_uncompiled(module):
            yield ranges
    finally:
        for handle in handles:
            handle.remove()


def sample_dims(layer: nn.Module) -> tuple[int, ...] | None:
    """The dimensions of the inputs of ``layer`` that share a scale if that is dynamic: of a row, or of an image.

    ``None``: the inputs are not rounded.
    """
    if read_linear(layer) is not None:
        return (-1,)
    if not isinstance(layer, nn.Conv2d) or type(layer).forward is not nn.Conv2d.forward:
        return None
    is_large = layer.groups == 1 and layer.weight[0].numel() >= FEWEST
    return (-3, -2, -1) if is_large and not isinstance(layer.padding, str) else None
