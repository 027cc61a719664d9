"""Tensors that have no values: prediction runs the training loop on them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

GROUPED_PRODUCT = torch.ops.aten._grouped_mm.default
"""The products of a mixture's experts in one operator."""

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
    return isinstance(tensor, FakeTensor) or isinstance(tensor.data, FakeTensor)


def holds_fakes(module: torch.nn.Module) -> bool:
    """Whether parameters of ``module`` are fake: what it does is being predicted."""
    return any(is_fake(parameter) for parameter in module.parameters())


def run_operator(operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an operator that may have fake arguments, also where its fake kernel refuses what the real one does.

    That of grouped products takes bfloat16 alone (torch 2.13), and the real ones any type. That of the CTC loss takes
    none, since what is kept for its backward is as long as the longest target, which may be known.
    """
    if operator is GROUPED_PRODUCT and isinstance(args[0], FakeTensor):
        return _grouped_product(*args, **kwargs)
    if operator in _CTC_LOSS and isinstance(args[0], FakeTensor) and not isinstance(args[3], FakeTensor):
        return _ctc_loss(*args, **kwargs)
    return operator(*args, **kwargs)


def _grouped_product(
    first: torch.Tensor,
    second: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    *groups, rows, _ = first.shape
    *other_groups, _, columns = second.shape
    if not groups and not other_groups:  # the groups are parts of the dimension that is summed over
        assert offs is not None
        groups = [offs.shape[0]]
    elif len(groups) != len(other_groups):  # parts of the rows, or of the columns
        groups = []
    return first.new_empty((*groups, rows, columns), dtype=out_dtype)


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
