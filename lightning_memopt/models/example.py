"""What Lightning calls an example: inputs of a module's forward, one of them, a tuple, or a dict of named ones."""

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


def call_with(module: nn.Module, inputs: Any) -> Any:
    """What ``module`` makes of ``inputs``."""
    if isinstance(inputs, dict):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def count_samples(inputs: Any) -> int:
    """The length of all tensors in ``inputs``; 0 where there are none, or they are not of one length.

    Example:
        >>> import torch
        >>> count_samples((torch.ones(8, 3), torch.ones(8))), count_samples((torch.ones(8, 3), torch.ones(3)))
        (8, 0)
    """
    sizes = {len(leaf) if leaf.dim() else 0 for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)}
    return sizes.pop() if len(sizes) == 1 else 0


def first_samples(inputs: Any, count: int) -> Any:
    """The first ``count`` samples of ``inputs``."""
    return tree_map_only(Tensor, lambda tensor: tensor[:count], inputs)
