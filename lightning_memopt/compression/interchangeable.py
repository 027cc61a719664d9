"""Whether units are wired as they were followed: put in another order everywhere, they compute the same.

The dependency graph takes an operator that it does not know for one that leaves features in their places. Behind one
that moves them, such as a shuffle of channels, a smaller module runs, and what is left in it is joined wrongly.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_memopt.compression.graph import Call, output_tensors
from lightning_memopt.compression.slots import Slot, UnitGroup

ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-8}
"""What another order of summation makes of outputs, at most and as a part of the largest; others are not compared."""

_DRAWN = {
    getattr(torch.ops.aten, name): value
    for names, value in (
        (("rand", "rand_like", "uniform", "uniform_", "randn", "randn_like", "normal", "normal_"), 0.75),
        (("bernoulli", "bernoulli_"), 1.0),  # with which dropout keeps everything
    )
    for name in names
}
"""Operators that draw a number for each place, and what is drawn everywhere instead."""

MISPLACED = "in another order they compute something else, so that what becomes of them is not known"


def find_misplaced(module: nn.Module, call: Call, groups: Sequence[UnitGroup]) -> list[UnitGroup]:
    """Those of ``groups`` whose units cannot be put in another order.

    Args:
        module: A module in evaluation mode; it is run a few times, and is as it was afterwards.
        call: Runs it.
        groups: Units that are to be removed.
    """
    groups = [group for group in groups if group.slots]
    if not groups:
        return []
    expected = _outputs(module, call)
    if not _alike(expected, _outputs(module, call)):  # draws numbers, as diffusion and variational models do
        call = _drawing_evenly(call)
        expected = _outputs(module, call)
        if not _alike(expected, _outputs(module, call)):  # counts its calls
            return []
    return list(_search(module, call, groups, expected))


def _drawing_evenly(call: Call) -> Call:
    """``call``, where what is drawn is the same in each run and in every place, so that it has no order."""

    def run(module: nn.Module) -> Any:
        devices = {tensor.device for tensor in module.parameters() if tensor.is_cuda}
        with torch.random.fork_rng(devices), _EvenDraws():
            torch.manual_seed(0)
            return call(module)

    return run


class _EvenDraws(TorchDispatchMode):
    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        drawn = func(*args, **(kwargs or {}))
        value = _DRAWN.get(func.overloadpacket)
        return drawn if value is None else drawn.fill_(value)


def _search(
    module: nn.Module, call: Call, groups: Sequence[UnitGroup], expected: Sequence[Tensor]
) -> Iterator[UnitGroup]:
    with _reordered(groups):
        is_same = _alike(expected, _outputs(module, call))
    if is_same:
        return
    if len(groups) == 1:
        yield groups[0]
        return
    half = len(groups) // 2
    for part in (groups[:half], groups[half:]):
        yield from _search(module, call, part, expected)


@contextmanager
def _reordered(groups: Sequence[UnitGroup]) -> Iterator[None]:
    old: dict[int, tuple[Tensor, Tensor]] = {}
    try:
        for group in groups:
            order = _order(group)
            # A tied tensor is in two slots, of the same places.
            places = {(id(slot.tensor), slot.dimension, tuple(slot.units.tolist())): slot for slot in group.slots}
            for slot in places.values():
                tensor = slot.tensor
                old.setdefault(id(tensor), (tensor, tensor.data))
                tensor.data = tensor.data.index_select(slot.dimension, _places(slot, order).to(tensor.device))
        yield
    finally:
        for tensor, values in old.values():
            tensor.data = values


def _order(group: UnitGroup) -> Tensor:
    """Another order, in which units change places with such as are in the same slots as often."""
    counts = [torch.bincount(slot.units[slot.units >= 0], minlength=group.size) for slot in group.slots]
    kinds = torch.stack(counts, 1).unique(dim=0, return_inverse=True)[1]
    order = torch.arange(group.size)
    generator = torch.Generator().manual_seed(0)
    for kind in range(int(kinds.max()) + 1):
        members = (kinds == kind).nonzero().view(-1)
        order[members] = members[torch.randperm(len(members), generator=generator)]
    return order


def _places(slot: Slot, order: Tensor) -> Tensor:
    """Which place of ``slot`` each is filled from, so that its units are in ``order``."""
    places = torch.arange(len(slot.units))
    inside = places[slot.units >= 0]
    inside = inside[slot.units[inside].argsort(stable=True)]  # unit by unit
    units = slot.units[inside]
    starts = torch.searchsorted(units, torch.arange(len(order)))
    rank = torch.arange(len(units)) - starts[units]
    places[inside] = inside[starts[order[units]] + rank]
    return places


def _outputs(module: nn.Module, call: Call) -> list[Tensor]:
    return [tensor.detach() for tensor in output_tensors(call(module))]


def _alike(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    for one, other in zip(expected, found, strict=True):
        if one.dtype in ROUNDING and one.numel():
            error, largest = (one - other).abs().max(), one.abs().max()
            if not error <= ROUNDING[one.dtype] * largest:  # true of NaN
                return False
    return True
