"""What a batch weighs in a mean over several: one, its samples, or its tokens."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_memopt.techniques.batches import CannotCut, batch_size

Normalize = Literal["batch", "samples", "tokens"]
Count = Callable[[Any], int | float | Tensor]
"""Gives what the loss of a batch is a mean over, as a number or as a tensor of no dimension."""

IGNORED_LABEL = -100
"""What ``torch.nn.functional.cross_entropy`` leaves out by default."""


def check_whole(number: object, name: str, of: str) -> int:
    """``number``, where it is a whole number of at least 1.

    Raises:
        ValueError: It is not; says so by ``name``, and what it is a number ``of``.
    """
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{name}={number!r} is no number of {of}; give a whole number, 1 or more.")
    return number


def counter(normalize: Normalize, count: Count | None = None, mask_key: str | int | None = None) -> Count:
    """The function that counts a batch, for the arguments that users give.

    Args:
        normalize: ``"batch"`` (each batch counts 1), ``"samples"`` or ``"tokens"``.
        count: With ``"tokens"``: counts a batch. It may return a tensor, which is never read back from the device.
        mask_key: With ``"tokens"``, instead of ``count``: where in the batch to find the mask or the labels. A mask
            (of booleans, of floats, or named so) counts what is not 0, labels what is not ``-100``.

    Raises:
        ValueError: An unknown ``normalize``, or arguments that do not go together.

    Example:
        >>> count = counter("tokens", mask_key="labels")
        >>> int(count({"labels": torch.tensor([[5, 6, -100], [7, -100, -100]])}))
        3
    """
    if count is not None and not callable(count):
        raise ValueError(f"count={count!r} is no function of the batch that returns a number.")
    if isinstance(mask_key, bool) or not isinstance(mask_key, str | int | None):
        raise ValueError(f"mask_key={mask_key!r} is no key (a string) and no index (a whole number) of a batch.")
    if normalize not in ("batch", "samples", "tokens"):
        raise ValueError(f"normalize={normalize!r} is unknown; possible are 'batch', 'samples' and 'tokens'.")
    if normalize != "tokens":
        if count is not None or mask_key is not None:
            raise ValueError(f"`count` and `mask_key` count tokens, and normalize={normalize!r}; use 'tokens'.")
        return _count_samples if normalize == "samples" else _count_one
    if (count is None) == (mask_key is None):
        raise ValueError(
            "normalize='tokens' needs either `count`, a function of the batch, or `mask_key`, where the batch has "
            "its mask or labels; " + ("neither was given." if count is None else "both were given.")
        )
    if count is not None:
        return count
    return partial(count_unmasked, mask_key=mask_key)  # not a lambda: callbacks are pickled for spawned processes


def count_unmasked(batch: Any, mask_key: Any) -> Tensor:
    """Number of tokens that a mask keeps or that labels do not ignore, as an integer tensor of no dimension.

    Args:
        batch: A mapping or sequence, or an object with attributes.
        mask_key: Key, index or attribute of a tensor of any shape. See :func:`counter`.

    Raises:
        ValueError: There is nothing at ``mask_key``, or it is not a tensor.
    """
    try:
        mask = batch[mask_key]
    except (TypeError, LookupError):
        mask = getattr(batch, mask_key, None) if isinstance(mask_key, str) else None
    if not isinstance(mask, Tensor):
        known = f"it has {list(batch)}" if hasattr(batch, "keys") else f"it is a {type(batch).__name__}"
        raise ValueError(
            f"mask_key={mask_key!r} names no tensor of the batch ({known}); name its mask or its labels, or give "
            "`count`, a function of the batch."
        )
    is_mask = mask.dtype == torch.bool or mask.is_floating_point() or "mask" in str(mask_key)
    return (mask != (0 if is_mask else IGNORED_LABEL)).sum()


def _count_samples(batch: Any) -> int:
    try:
        return batch_size(batch)
    except CannotCut as error:
        raise ValueError(
            f"{error.found}, and normalize='samples' counts its samples; use normalize='tokens' with `count`, a "
            "function of the batch."
        ) from error


def _count_one(batch: Any) -> int:
    return 1
