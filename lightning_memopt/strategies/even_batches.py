"""Batches whose number nobody knows for certain beforehand, and of which all ranks take equally many."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any


class EvenBatches:
    """A data loader of a stream, which ends on every rank where it ends on one.

    A rank without a batch would be waited for, for ever, by those that have one. So before each batch all say whether
    they have one: a number from rank to rank.

    Args:
        loader: The rank's loader; its attributes are this one's.
        all_agree: Whether what is passed is true on all ranks. Every rank calls it equally often.
        is_needed: Whether ranks wait for each other in what the batches are for; asked when iterating begins.
    """

    def __init__(self, loader: Any, all_agree: Callable[[bool], bool], is_needed: Callable[[], bool]) -> None:
        vars(self).update(_loader=loader, _all_agree=all_agree, _is_needed=is_needed)

    def __getattr__(self, name: str) -> Any:
        if "_loader" not in vars(self):  # while it is copied
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._loader, name, value)

    def __iter__(self) -> Iterator[Any]:
        if not self._is_needed():
            yield from self._loader
            return
        batches, nothing, count = iter(self._loader), object(), 0
        while True:
            batch = next(batches, nothing)
            if not self._all_agree(batch is not nothing):
                break
            count += 1
            yield batch
        if batch is not nothing:
            warnings.warn(
                f"Another rank has no batch after {count}, and all take equally many: what this rank has left is not "
                "used in this epoch. Give each rank equally many.",
                stacklevel=2,
            )


class EvenBatchesWithLength(EvenBatches):
    """One whose stream says how many batches it has. Ranks say the same, and may have fewer: their part of all."""

    def __len__(self) -> int:
        return len(self._loader)
