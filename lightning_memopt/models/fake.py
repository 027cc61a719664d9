"""Tensors that have no values: prediction runs the training loop on them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from lightning_memopt.models.grouped_products import GROUPED_PRODUCT, teach_grouped_products

_CTC_LOSS = (torch.ops.aten._ctc_loss.default, torch.ops.aten._ctc_loss.Tensor)


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` (a parameter, a loss, ...) is a fake one, whose values must not be asked for.

    Example:
        >>> from torch._subclasses.fake_tensor import FakeTensorMode
        >>> with FakeTensorMode():
        ...     fake = torch.nn.Linear(2, 2).weight
        >>> is_fake(fake), is_fake(torch.ones(2))
        (True, False)
    """
    part = getattr(tensor, "_local_tensor", tensor)  # this rank's, of a split one
    return isinstance(part, FakeTensor) or isinstance(part.data, FakeTensor)


def holds_fakes(module: torch.nn.Module) -> bool:
    """Whether parameters of ``module`` are fake: what it does is being predicted."""
    return any(is_fake(parameter) for parameter in module.parameters())


def run_operator(operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an operator that may have fake arguments, also where its fake kernel refuses what the real one does.

    That of grouped products takes bfloat16 alone. That of the CTC loss takes none, since what is kept for its
    backward is as long as the longest target, which may be known.
    """
    if operator is GROUPED_PRODUCT:
        teach_grouped_products()
    if operator in _CTC_LOSS and isinstance(args[0], FakeTensor) and not isinstance(args[3], FakeTensor):
        return _ctc_loss(*args, **kwargs)
    return operator(*args, **kwargs)


def _ctc_loss(
    log_probabilities: torch.Tensor,
    targets: torch.Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    zero_infinity: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    with unset_fake_temporarily():
        longest = int(max(target_lengths))
    steps, *batch, _ = log_probabilities.shape
    losses = log_probabilities.new_empty(batch)
    return losses, log_probabilities.new_empty((*(batch or [1]), steps, 2 * longest + 1))
