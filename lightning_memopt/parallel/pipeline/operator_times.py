"""How long operators take on the device that trains: each tried once on values that are made up.

A stage may be larger than a device, and a link is only known by what it calls, so it is operators that are timed, one
after the other, and never more than one of them in memory. Operators with arguments of the same shapes have one time,
so blocks that are alike cost the same to the last digit, and only what differs is compared by clocks.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

REPETITIONS = 5
LONG_SECONDS = 0.02
"""An operator that takes longer is not run five times: its noise is small beside it."""


@dataclass(frozen=True)
class _Like:
    """A tensor to be made."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self, device: torch.device) -> Tensor:
        elements = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        if 0 in self.shape:
            elements = 0
        if self.dtype.is_floating_point or self.dtype.is_complex:
            flat = torch.rand(elements, device=device).to(self.dtype)
        else:  # an index of any table, a mask that hides nothing
            flat = torch.full((elements,), self.dtype == torch.bool, dtype=self.dtype, device=device)
        tensor = flat.as_strided(self.shape, self.stride).detach()
        return tensor.requires_grad_(self.dtype.is_floating_point or self.dtype.is_complex)


@dataclass(frozen=True)
class _Call:
    """An operator with arguments of some shapes."""

    function: Any
    leaves: tuple[Hashable, ...]
    structure: TreeSpec

    def try_on(self, device: torch.device) -> float | None:
        """Seconds of its forward and backward; ``None`` where it does not run on values that are made up."""
        leaves = [leaf.make(device) if isinstance(leaf, _Like) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.structure)
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        gradients: list[Tensor] = []  # made in the first run, which is not counted

        def forward() -> None:
            with torch.no_grad():
                self.function(*args, **kwargs)

        def forward_and_backward() -> None:
            outputs = [value for value in tree_leaves(self.function(*args, **kwargs)) if isinstance(value, Tensor)]
            outputs = [value for value in outputs if value.requires_grad]
            if not gradients:
                gradients.extend(map(torch.ones_like, outputs))
            torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)

        for run in (forward_and_backward, forward):  # what has no derivative, or writes into a leaf
            try:
                return _seconds_of(run, device)
            except Exception:
                continue
        return None


class OperatorTimes:
    """Collects what operators a step calls at each of its positions, and times them afterwards.

    Args:
        device: Where they will run.

    Example:
        >>> times = OperatorTimes(torch.device("cpu"))
        >>> times.heard(0, torch.ops.aten.mm.default, (torch.ones(8, 8), torch.ones(8, 8)), {}, counted=512.0)
        >>> [seconds > 0 for seconds in times.costs(positions=1)]
        [True]
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._calls: Counter[tuple[int, _Call]] = Counter()
        self._counted: dict[_Call, float] = {}

    def heard(
        self, position: int, function: Any, args: Sequence[Any], kwargs: dict[str, Any], counted: float
    ) -> None:
        """An operator was called at ``position``; ``counted`` is what it costs by its count."""
        leaves, structure = tree_flatten((tuple(args), kwargs))
        call = _Call(function, tuple(_described(leaf) for leaf in leaves), structure)
        self._calls[position, call] += 1
        self._counted[call] = counted

    def costs(self, positions: int) -> list[float]:
        """Seconds of each position; an operator that cannot be tried costs as its count says beside the others."""
        devices = [torch.cuda.current_device()] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            tried = {call: call.try_on(self._device) for call in self._counted}
        seconds = {call: value for call, value in tried.items() if value is not None}
        counted = sum(self._counted[call] for call in seconds)
        rate = sum(seconds.values()) / counted if counted else 1.0
        found = [0.0] * positions
        for (position, call), times in self._calls.items():
            found[position] += times * seconds.get(call, self._counted[call] * rate)
        return found


def _described(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return _Like(tuple(leaf.shape), leaf.stride(), leaf.dtype)
    return leaf  # numbers, types, devices: what operators take


def _seconds_of(run: Callable[[], None], device: torch.device) -> float:
    first = _clocked(run, device)  # which also sets up what the operator needs
    if first > LONG_SECONDS:
        return _clocked(run, device)
    return min(_clocked(run, device) for _ in range(REPETITIONS))


def _clocked(run: Callable[[], None], device: torch.device) -> float:
    started = perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return perf_counter() - started
