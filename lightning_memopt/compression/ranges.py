"""Observe how large the inputs of linear layers are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_memopt.models.linears import read_linear


@contextmanager
def observe_inputs(module: nn.Module) -> Iterator[dict[str, float]]:
    """Collect, while the block runs, the largest magnitude that each linear layer below ``module`` is given.

    Yields:
        By qualified name of the layer; filled as layers are called.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> with observe_inputs(net) as ranges:
        ...     _ = net(torch.tensor([[0.5, -3.0]]))
        >>> ranges
        {'0': 3.0}
    """
    ranges: dict[str, float] = {}
    handles = []
    for name, layer in module.named_modules():
        if read_linear(layer) is None:
            continue

        def observe(_: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
            if inputs and isinstance(inputs[0], torch.Tensor) and inputs[0].numel():
                ranges[name] = max(ranges.get(name, 0.0), float(inputs[0].detach().abs().amax()))

        handles.append(layer.register_forward_pre_hook(observe))
    try:
        yield ranges
    finally:
        for handle in handles:
            handle.remove()
