"""What the CPU allocator itself reports, down to the scratch that kernels take where no tensor shows it."""

import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.autograd.profiler import profile

from lightning_memopt.memory.ledger import Holding, Ledger, State


class Allocation(NamedTuple):
    """One allocation, or release where ``size_bytes`` is negative."""

    time: int
    address: int
    size_bytes: int


class AllocatorEvents:
    """Records the CPU allocator's events between :meth:`start` and :meth:`stop`, by PyTorch's profiler."""

    def __init__(self) -> None:
        self._profile: Any = None

    def start(self) -> bool:
        """Begin; False if somebody else's profiler runs already, of which there can be only one."""
        if torch.autograd._profiler_enabled():
            return False
        self._profile = profile(profile_memory=True)
        with _without_announcements():
            self._profile.__enter__()
        return True

    def stop(self) -> list[Allocation]:
        """End, and give the events in order; none if it did not start."""
        if self._profile is None:
            return []
        self._profile.__exit__(None, None, None)
        tree = self._profile.kineto_results.experimental_event_tree()
        self._profile = None
        return sorted(_allocations(tree), key=lambda allocation: allocation.time)


@contextmanager
def _without_announcements() -> Iterator[None]:
    """Keep the profiler's library from writing a line to stderr at each start and stop, through the progress bar.

    It reads its log level once, at the first start of the process; a level that the user has set stays. Announcements
    are of level 10.
    """
    if "KINETO_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["KINETO_LOG_LEVEL"] = "11"
    try:
        yield
    finally:
        del os.environ["KINETO_LOG_LEVEL"]


def _allocations(tree: Iterable[Any]) -> Iterator[Allocation]:
    pending = list(tree)
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        kind, fields = event.typed
        if kind == torch._C._profiler._EventType.Allocation and fields.device.type == "cpu":
            yield Allocation(event.start_time_ns, fields.ptr, fields.alloc_size)


def settle(ledger: Ledger, allocations: Sequence[Allocation]) -> None:
    """Correct the books by what the allocator saw.

    A holding takes the times of the allocation at its address, an allocation that is no holding's goes on the books
    as scratch of the operator that ran.

    Args:
        ledger: Books of the same run; holdings and operations in nanoseconds since the epoch.
        allocations: All the allocator's events of that run, in order.
    """
    ledger.operations.sort(key=lambda operation: operation.begin.time)
    holdings: defaultdict[int, list[Holding]] = defaultdict(list)
    for holding in ledger.holdings:
        if holding.address and not holding.is_opening:
            holdings[holding.address].append(holding)
    for allocation, released in _lifetimes(allocations):
        holding = _made_by(allocation, released, holdings[allocation.address]) or _scratch(ledger, allocation)
        first = holding.states[0]
        holding.states[0] = first._replace(since=first.since._replace(time=allocation.time))
        if released is not None:
            _release(ledger, holding, released)


def _lifetimes(allocations: Iterable[Allocation]) -> Iterator[tuple[Allocation, int | None]]:
    """Each allocation with the time of its release."""
    live: dict[int, Allocation] = {}
    for allocation in allocations:
        begun = live.pop(allocation.address, None)
        if begun is not None:
            yield begun, allocation.time
        if allocation.size_bytes > 0:
            live[allocation.address] = allocation
    for begun in live.values():
        yield begun, None


def _made_by(allocation: Allocation, released: int | None, candidates: Sequence[Holding]) -> Holding | None:
    """The tensor at this address that was first seen while the allocation lived; candidates are in order."""
    index = bisect_left(candidates, allocation.time, key=lambda holding: holding.states[0].since.time)
    if index == len(candidates):
        return None
    first = candidates[index].states[0]
    is_in_time = released is None or first.since.time <= released
    return candidates[index] if is_in_time and first.size_bytes == allocation.size_bytes else None


def _scratch(ledger: Ledger, allocation: Allocation) -> Holding:
    moment = ledger.moment_at(allocation.time)
    holding = Holding([State(moment, allocation.size_bytes, "temporaries", moment.module)])
    ledger.holdings.append(holding)
    return holding


def _release(ledger: Ledger, holding: Holding, time: int) -> None:
    if holding.is_released:
        last = holding.states[-1]
        holding.states[-1] = last._replace(since=last.since._replace(time=time))
    else:
        holding.change(ledger.moment_at(time), size_bytes=0)
