"""Run one batch as several micro-batches with the gradient of the whole, as small as memory needs."""

import gc
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_memopt.models.out_of_memory import is_out_of_memory
from lightning_memopt.techniques.batches import Split, batch_size, detached, merge_outputs, micro_batches, weigh
from lightning_memopt.techniques.counting import Count

Result = TypeVar("Result")

WHOLE_BATCH = sys.maxsize
"""A micro-batch size that no batch exceeds."""


def backward_in_micro_batches(
    step: Callable[[Any], Any],
    batch: Any,
    size: int,
    *,
    count: Count = batch_size,
    split: Split = micro_batches,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    around: Callable[[float | Tensor, bool], AbstractContextManager] = lambda weight, is_last: nullcontext(),
) -> Any:
    r"""Forward and backward of ``batch``, ``size`` samples at a time: the activations of the others never exist.

    The loss :math:`L` of the batch is a mean, so with micro-batches that count :math:`n_j` samples (or tokens) it is
    :math:`\sum_j n_j L_j / \sum_j n_j`, and so is its gradient.

    Args:
        step: Gives a micro-batch's loss, a tensor of no dimension, or a mapping with it under ``"loss"``; ``None``
            leaves the micro-batch out.
        batch: What :func:`~lightning_memopt.techniques.batches.micro_batches` can split.
        size: Samples in a micro-batch.
        count: What the loss of a batch is a mean over; for example
            ``counter("tokens", mask_key="labels")`` of :mod:`lightning_memopt.techniques.counting`.
        split: Cuts the batch.
        backward: Called with each scaled loss.
        around: Makes the context in which a micro-batch runs, from its weight (they sum to 1) and whether it is the
            last.

    Returns:
        What ``step`` returns, for the whole batch, detached: the loss is the weighted mean, for the rest see
        :func:`~lightning_memopt.techniques.batches.merge_outputs`. ``None`` if each micro-batch was left out.

    Raises:
        ValueError: The batch cannot be split.

    Example:
        >>> model, x = nn.Linear(2, 1), torch.randn(8, 2)
        >>> loss = backward_in_micro_batches(lambda micro: model(micro).square().mean(), x, size=3)
        >>> torch.allclose(loss, model(x).square().mean())
        True
    """
    pieces = split(batch, size)
    counts = [count(piece) for piece in pieces]
    total = sum(counts)
    total = torch.where(total > 0, total, 1) if isinstance(total, Tensor) else total or 1
    outputs, sizes, weights = [], [], []
    for index, (piece, counted) in enumerate(zip(pieces, counts, strict=True)):
        weight = counted / total
        with around(weight, index == len(pieces) - 1):
            output = step(piece)
            loss = output["loss"] if isinstance(output, Mapping) else output
            if loss is not None:
                backward(weigh(loss, weight))
                outputs.append(detached(output))  # else the graph of each micro-batch would live on in its output
                sizes.append(_size_or_none(piece))
                weights.append(weight)
            del output, loss
    return merge_outputs(outputs, sizes, weights) if outputs else None


def halve_on_out_of_memory(
    attempt: Callable[[int], Result],
    size: int,
    samples: int,
    *,
    restore: Callable[[], None],
    agree: Callable[[int], int] = lambda size: size,
) -> tuple[Result, int]:
    """Call ``attempt(size)``; when memory runs out, undo what it did and call it with half the size.

    Args:
        attempt: Runs the batch in micro-batches of the size that it is given.
        size: Where to begin, :data:`WHOLE_BATCH` for the whole batch at once.
        samples: Samples in the batch.
        restore: Brings back all that an attempt changes.
        agree: Makes the smallest of the devices' sizes known to all of them. It is called once for each attempt, also
            by a device whose attempt went through, which repeats it with the others.

    Returns:
        What ``attempt`` returned, and the size that went through.

    Raises:
        torch.OutOfMemoryError: One sample does not fit.

    Example:
        >>> def attempt(size):
        ...     if size > 2:
        ...         raise MemoryError
        ...     return f"in micro-batches of {size}"
        >>> halve_on_out_of_memory(attempt, WHOLE_BATCH, samples=8, restore=lambda: None)
        ('in micro-batches of 2', 2)
    """
    while True:
        result, error = _try(attempt, size)
        fits = size
        if error is not None:
            tried = min(size, samples)
            fits = (tried + 1) // 2 if tried > 1 else 0
        agreed = agree(fits)
        if agreed == size:
            return result, size  # type: ignore[return-value]
        if agreed == 0:
            raise torch.OutOfMemoryError(
                "Memory ran out with micro-batches of a single sample, so MicroBatching has nothing left to split. "
                "Save activations as well (ActivationCheckpointing, ActivationOffload), or optimizer state "
                "(LowBitOptimizer)." + ("" if error else " (It was another device that ran out of memory.)")
            ) from error
        # The attempt's activations hang on its traceback's frames: without this they would live through the next.
        _release(error)
        del error, result
        restore()
        size = agreed


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over the default process group, outside the backward.

    A parameter that has a gradient on some ranks only counts as 0 on the others.

    Args:
        parameters: The same on each rank, in the same order.
    """
    listed = [parameter for parameter in parameters if parameter.requires_grad]
    if not listed:
        return
    world_size = torch.distributed.get_world_size()
    used = torch.tensor(
        [parameter.grad is not None for parameter in listed], dtype=torch.int, device=listed[0].device
    )
    torch.distributed.all_reduce(used)
    for parameter, is_used in zip(listed, used.tolist(), strict=True):
        if is_used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad.div_(world_size)


def _try(attempt: Callable[[int], Result], size: int) -> tuple[Result | None, Exception | None]:
    try:
        return attempt(size), None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None, error


def _release(error: BaseException | None) -> None:
    """Drop what the frames of an error, and of those that it came from, hold on to."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _size_or_none(batch: Any) -> int | None:
    try:
        return batch_size(batch)
    except ValueError:
        return None
