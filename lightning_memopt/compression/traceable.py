"""A module as it has to be while what goes where in it is followed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_memopt.models.experts import read_experts


@contextmanager
def traceable(module: nn.Module) -> Iterator[None]:
    """Have ``module`` in evaluation mode, with gradients of frozen parameters too and without caches of keys.

    Stacked experts are one step, from what they read to what they give. What is within them is known, and where every
    other feature is of a gate (gpt-oss), the dependency graph takes each for the one at half its place, without end.
    """
    modes = {child: child.training for child in module.modules()}
    frozen = [p for p in module.parameters() if not p.requires_grad and p.is_floating_point()]
    # A cache of keys and values is concatenated to an empty one, where the dependency graph loses count.
    configs: list[Any] = [getattr(child, "config", None) for child in module.modules()]
    caching = {id(config): config for config in configs if getattr(config, "use_cache", False)}
    hooks: list[RemovableHandle] = []
    try:
        hooks += [child.register_forward_hook(_as_one_step) for child in module.modules() if read_experts(child)]
        module.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        for config in caching.values():
            config.use_cache = False
        with torch.enable_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in frozen:
            parameter.requires_grad_(False)
        for config in caching.values():
            config.use_cache = True
        for child, mode in modes.items():
            child.training = mode


def _as_one_step(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """The same output, with the gradient of the first input alone."""
    if not inputs or not isinstance(output, Tensor) or output.shape != inputs[0].shape:
        return output
    return inputs[0] + (output - inputs[0]).detach()
