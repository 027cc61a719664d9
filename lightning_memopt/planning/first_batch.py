"""A batch like the first of a loader, which is not advanced."""

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset

from lightning_memopt.techniques.batches import copied
from lightning_memopt.techniques.host_random import generators_among, host_random_kept


def batch_of(loaders: Any, has_begun: bool = False) -> Any:
    """A batch like the first that ``loaders`` (a loader, or a collection of them) will give.

    Args:
        loaders: Of a stream that cannot begin twice the batch is put back.
        has_begun: The first pass may begin now, so what the batch of any stream was taken from is that. Not so before
            ranks meet, where a stream that deals out its samples to them does not know them yet.

    Random numbers go on as if nothing had been taken, but where a pass has begun, which draws once and for all.
    """
    return tree_map(partial(_first, has_begun=has_begun), loaders, is_leaf=_is_loader)


def can_be_indexed(loader: Any) -> bool:
    """Whether samples can be read without a pass over the loader having begun."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def _is_loader(item: Any) -> bool:
    return hasattr(item, "__iter__") and not isinstance(item, list | tuple | dict)


def _first(loader: Any, has_begun: bool) -> Any:
    is_indexed = can_be_indexed(loader)
    if not is_indexed and not isinstance(loader, CombinedLoader) and (has_begun or _is_one_stream(loader)):
        batches = iter(loader)
        first = next(batches)
        with suppress(TypeError):  # an iterator of Python's own keeps its class, and loses the batch
            _begin_with(loader, chain([first], batches))
        return copied(first)
    with torch.random.fork_rng(devices=[]), host_random_kept(_generators_of(loader)):
        if is_indexed and loader.batch_size:
            count = min(loader.batch_size, len(loader.dataset))
            return loader.collate_fn([loader.dataset[index] for index in range(count)])
        return copied(next(iter(loader)))


def _generators_of(loader: Any) -> list[Any]:
    """What the loader draws from beside the global generators, for its order or its samples."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)
    parts = (loader, getattr(loader, "dataset", None), *samplers)
    return generators_among(value for part in parts for value in getattr(part, "__dict__", {}).values())


def _is_one_stream(loader: Any) -> bool:
    """Whether each pass goes on where the one before was left."""
    dataset = getattr(loader, "dataset", None)
    return isinstance(dataset, IterableDataset) and iter(dataset) is iter(dataset)


def _begin_with(loader: Any, batches: Iterator[Any]) -> None:
    """Let the next pass over ``loader`` be ``batches``; it stays an instance of its class, as Lightning asks."""
    cls = type(loader)

    def begin(self: Any) -> Iterator[Any]:
        self.__class__ = cls
        return batches

    own = {"__iter__": begin, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    loader.__class__ = type(cls.__name__, (cls,), own)
