"""A module as it has to be while what goes where in it is followed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def traceable(module: nn.Module) -> Iterator[None]:
    """Have ``module`` in evaluation mode, with gradients of frozen parameters too and without caches of keys."""
    modes = {child: child.training for child in module.modules()}
    frozen = [p for p in module.parameters() if not p.requires_grad and p.is_floating_point()]
    # A cache of keys and values is concatenated to an empty one, where the dependency graph loses count.
    configs: list[Any] = [getattr(child, "config", None) for child in module.modules()]
    caching = {id(config): config for config in configs if getattr(config, "use_cache", False)}
    try:
        module.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        for config in caching.values():
            config.use_cache = False
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for config in caching.values():
            config.use_cache = True
        for child, mode in modes.items():
            child.training = mode
