"""Time two modules side by side, so that what else the machine does falls on both."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from lightning_memopt.models.compiled import run_uncompiled
from lightning_memopt.models.example import call_with, count_samples, first_samples


@dataclass(frozen=True)
class Latency:
    """The median time of one forward.

    Attributes:
        batch_size: Samples in the batch.
        before_seconds: Of the original.
        after_seconds: Of the compressed module.
        speedup: Median of the ratios of neighbouring runs; not quite the ratio of the medians.
    """

    batch_size: int
    before_seconds: float
    after_seconds: float
    speedup: float


def compare_latency(
    before: Callable[[Any], Any],
    after: Callable[[Any], Any],
    batch: Any,
    batch_size: int,
    *,
    runs: int = 20,
    clock: Callable[[], float] = perf_counter,
) -> Latency:
    """Time both on one batch, in turns and without gradients.

    Args:
        before: The original; called as ``before(batch)``.
        after: The compressed module, likewise; both in evaluation mode and on one device.
        batch: What they are given.
        batch_size: Samples in it, for the record.
        runs: How many pairs of runs; a few untimed ones come first.
        clock: What tells the time, in seconds; ``time.process_time`` leaves out what else the machine does, on CPUs.

    Example:
        >>> net = torch.nn.Linear(2, 2)
        >>> compare_latency(net, net, torch.ones(3, 2), 3).batch_size
        3
    """
    with torch.no_grad():
        for _ in range(3):
            before(batch), after(batch)
        pairs = [(_seconds(before, batch, clock), _seconds(after, batch, clock)) for _ in range(runs)]
    return Latency(
        batch_size=batch_size,
        before_seconds=median(first for first, _ in pairs),
        after_seconds=median(second for _, second in pairs),
        speedup=median(first / second for first, second in pairs),
    )


def compare_latencies(before: nn.Module, after: nn.Module, inputs: Any) -> tuple[Latency, ...]:
    """Time both in evaluation mode, not compiled, on the first sample of ``inputs`` and on all of them.

    Args:
        before: The original.
        after: The compressed module, on the same device.
        inputs: What their ``forward`` takes, with a dimension of samples first: a tensor, a tuple of positional
            arguments, or a dict of named ones.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> [one.batch_size for one in compare_latencies(net, net, torch.ones(3, 2))]
        [1, 3]
    """
    modes = {part: part.training for module in (before, after) for part in module.modules()}
    before.eval(), after.eval()
    try:
        with run_uncompiled(before), run_uncompiled(after):  # a copy is not compiled, so that neither may be
            return tuple(
                compare_latency(
                    lambda batch: call_with(before, batch), lambda batch: call_with(after, batch),
                    first_samples(inputs, size), size,
                )
                for size in sorted({1, count_samples(inputs)})
            )  # fmt: skip
    finally:
        for part, training in modes.items():
            part.training = training


def _seconds(call: Callable[[Any], Any], batch: Any, clock: Callable[[], float]) -> float:
    _synchronize()
    start = clock()
    call(batch)
    _synchronize()
    return clock() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
