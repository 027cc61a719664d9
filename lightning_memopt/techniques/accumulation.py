"""Accumulate gradients over a window of batches so that they are those of one large batch."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

Schedule = int | Mapping[int, int] | Callable[[int], int]
"""How many batches to accumulate: a number, ``{from: number}``, or a function of the epoch or the step."""


def accumulation_factor(schedule: Schedule, at: int) -> int:
    """How many batches a window that begins at ``at`` has.

    Args:
        schedule: A number of batches; a mapping from the first epoch (or step) to the number from there on, 1 before
            the first; or a function of the epoch (or step).
        at: Epochs or optimizer steps completed, as the schedule counts.

    Raises:
        ValueError: The schedule is empty, or it or what it returns is not a whole number of at least 1.

    Example:
        >>> [accumulation_factor({0: 8, 4: 2}, epoch) for epoch in (0, 3, 4, 9)]
        [8, 8, 2, 2]
    """
    if isinstance(schedule, Mapping):
        begun = [start for start in schedule if start <= at]
        return _checked(schedule[max(begun)], f"schedule[{max(begun)}]") if begun else 1
    if callable(schedule):
        return _checked(schedule(at), f"schedule({at})")
    return _checked(schedule, "schedule")


def check_schedule(schedule: Schedule) -> None:
    """Raise ``ValueError`` for a schedule that :func:`accumulation_factor` could not follow to its end."""
    if not isinstance(schedule, Mapping):
        if not callable(schedule):
            _checked(schedule, "schedule")
        return
    if not schedule:
        raise ValueError("the schedule is empty, so it says nothing; give at least {0: number of batches}.")
    for start in schedule:
        if not isinstance(start, int) or isinstance(start, bool) or start < 0:
            raise ValueError(
                f"schedule has the key {start!r}, and keys are the epochs or steps, 0 or more, from which a number "
                "of batches holds."
            )
        accumulation_factor(schedule, start)


def count_optimizer_steps(
    schedule: Schedule, batches: int, epochs: int, by: Literal["epoch", "step"] = "epoch", most: float = math.inf
) -> int:
    """How often the optimizer steps in ``epochs`` of ``batches`` each, where a window ends with its epoch.

    Args:
        schedule: As for :func:`accumulation_factor`.
        batches: In an epoch, 0 or more.
        epochs: How many.
        by: What ``schedule`` counts.
        most: Steps after which training ends.

    Raises:
        ValueError: A function returned no whole number of at least 1.

    Example:
        >>> count_optimizer_steps({0: 4, 1: 2}, batches=10, epochs=2)  # 3 + 5
        8
    """
    steps = 0
    for epoch in range(epochs):
        left = batches
        while left > 0 and steps < most:
            at = epoch if by == "epoch" else steps
            factor = accumulation_factor(schedule, at)
            windows = math.ceil(left / factor)
            if by == "step":
                windows = min(windows, _steps_until_change(schedule, at))
            steps += windows
            left -= windows * factor
    return int(min(steps, most))


def factor_for_target(target_batch_size: int, batch_size: int, devices: int = 1) -> int:
    """How many batches of ``batch_size`` on each of ``devices`` make ``target_batch_size`` samples.

    Raises:
        ValueError: They do not make it exactly; the sentence names the nearest sizes that can be had.

    Example:
        >>> factor_for_target(1024, batch_size=32, devices=8)
        4
    """
    step = batch_size * devices
    factor, rest = divmod(target_batch_size, step)
    if rest or not factor:
        nearest = [str(size) for size in (factor * step, (factor + 1) * step) if size]
        raise ValueError(
            f"target_batch_size={target_batch_size} is no multiple of {step} ({batch_size} samples a batch x "
            f"{devices} device{'s' if devices > 1 else ''}); {' or '.join(nearest)} would be."
        )
    return factor


@dataclass
class GradientWindow:
    r"""One window of accumulated batches, whose gradient is the mean over all that its batches count.

    With losses :math:`L_i` that are means over :math:`n_i` samples or tokens, the gradient of one batch with all of
    them is :math:`\sum_i n_i \nabla L_i / \sum_i n_i`. The sum of the counts is known at the window's last batch
    only, so the others are scaled by :math:`n_i / r` with a ``reference`` :math:`r`, and what is pending is rescaled
    by :math:`r / \sum_i n_i` just before the last backward. From then on the gradients are right, for the hooks, the
    clipping and the averaging over devices that follow. Dividing by the number of batches instead weighs tokens in
    short batches more than those in long ones (https://github.com/Lightning-AI/pytorch-lightning/issues/20350).

    With several devices that average their gradients, the mean is over all of them: ``mean_over_devices`` takes it of
    a number.

    Attributes:
        parameters: Whose gradients are pending.
        reference: Roughly the sum of the counts, the same on all devices. It cancels out, and only keeps the pending
            gradients in a range that 16-bit gradients can hold.
        mean_over_devices: The mean of a number over the devices that average their gradients.
        pending_elsewhere: Finds gradients that no parameter has as ``grad`` yet, such as
            :func:`~lightning_memopt.parallel.unreduced.unreduced_gradients` of a module that FSDP2 shards.
        total: What the batches so far count.

    Example:
        >>> model, batches = nn.Linear(2, 1), [torch.randn(3, 2), torch.randn(5, 2)]
        >>> window = GradientWindow(list(model.parameters()), reference=8)
        >>> for i, batch in enumerate(batches):
        ...     scale = window.add(len(batch), is_last=i == 1)
        ...     (model(batch).mean() * scale).backward()
        >>> grad = model.weight.grad.clone()
        >>> model.zero_grad()
        >>> model(torch.cat(batches)).mean().backward()
        >>> torch.allclose(grad, model.weight.grad)
        True
    """

    parameters: Iterable[nn.Parameter]
    reference: float | Tensor
    mean_over_devices: Callable[[float | Tensor], float | Tensor] = field(default=lambda number: number)
    pending_elsewhere: Callable[[], Iterable[Tensor]] = tuple
    total: float | Tensor = 0
    _divisor: float | Tensor = field(init=False)
    _has_pending: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._divisor = self.reference

    def add(self, count: float | Tensor, *, is_last: bool) -> float | Tensor:
        """Add a batch to the window, and get what its loss is to be scaled by.

        Args:
            count: Samples or tokens that the batch's loss is a mean over.
            is_last: Whether the optimizer steps after this batch. Rescales the pending gradients.
        """
        self.total = self.total + count
        if is_last:
            self._divide_by(or_one(self.mean_over_devices(self.total)))
        self._has_pending = True
        return count / self._divisor

    def drop(self, count: float | Tensor, *, is_last: bool) -> None:
        """Take back a batch that :meth:`add` counted and that then had no backward."""
        self.total = self.total - count
        if is_last:
            self._divide_by(or_one(self.total))

    def _divide_by(self, divisor: float | Tensor) -> None:
        factor = self._divisor / divisor
        self._divisor = divisor
        if not self._has_pending or (not isinstance(factor, Tensor) and factor == 1):
            return
        own = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        with torch.no_grad():
            for gradient in {id(gradient): gradient for gradient in (*own, *self.pending_elsewhere())}.values():
                gradient.mul_(factor)


def or_one(total: float | Tensor) -> float | Tensor:
    """A window in which all tokens are masked has no gradient rather than an undefined one."""
    return torch.where(total > 0, total, 1) if isinstance(total, Tensor) else total or 1


def _steps_until_change(schedule: Schedule, at: int) -> int:
    if isinstance(schedule, Mapping):
        return min((start - at for start in schedule if start > at), default=sys.maxsize)
    return 1 if callable(schedule) else sys.maxsize


def _checked(factor: object, name: str) -> int:
    if not isinstance(factor, int) or isinstance(factor, bool) or factor < 1:
        raise ValueError(f"{name} is {factor!r}, and a window has a whole number of batches, 1 or more.")
    return factor
