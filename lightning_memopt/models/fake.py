"""Tell tensors that have no values: prediction runs the training loop on them."""

import torch
from torch._subclasses.fake_tensor import FakeTensor


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` (a parameter, a loss, ...) is a fake one, whose values must not be asked for.

    Example:
        >>> from torch._subclasses.fake_tensor import FakeTensorMode
        >>> with FakeTensorMode():
        ...     fake = torch.nn.Linear(2, 2).weight
        >>> is_fake(fake), is_fake(torch.ones(2))
        (True, False)
    """
    return isinstance(tensor, FakeTensor) or isinstance(tensor.data, FakeTensor)


def holds_fakes(module: torch.nn.Module) -> bool:
    """Whether parameters of ``module`` are fake: what it does is being predicted."""
    return any(is_fake(parameter) for parameter in module.parameters())
