"""Read mixtures of experts whose matrices lie stacked in one parameter, a slice for each expert."""

from torch import Tensor, nn


def holds_experts(module: nn.Module, parameter: Tensor) -> bool:
    """Whether ``parameter`` of ``module`` is a stack of matrices of the experts that the module speaks of.

    Example:
        >>> import torch
        >>> module = nn.Module()
        >>> module.num_experts = 4
        >>> holds_experts(module, torch.empty(4, 16, 8)), holds_experts(module, torch.empty(1, 16, 8))
        (True, False)
    """
    if parameter.ndim != 3 or len(parameter) < 2:
        return False
    return any("experts" in name and value == len(parameter) for name, value in vars(module).items())


def output_dim(module: nn.Module) -> int:
    """The dimension of such a parameter along which outputs lie; most are stored as linear layers are."""
    return 2 if getattr(module, "is_transposed", False) is True else 1
