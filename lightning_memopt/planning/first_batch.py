"""A batch like the first of a loader, which is not advanced."""

from typing import Any

from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset


def batch_of(loaders: Any) -> Any:
    """A batch like the first that ``loaders`` (a loader, or a collection of them) will give."""
    return tree_map(_first, loaders, is_leaf=_is_loader)


def _is_loader(item: Any) -> bool:
    return hasattr(item, "__iter__") and not isinstance(item, list | tuple | dict)


def _first(loader: Any) -> Any:
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset) and loader.batch_size:
        count = min(loader.batch_size, len(loader.dataset))  # type: ignore[arg-type]
        return loader.collate_fn([loader.dataset[index] for index in range(count)])
    return next(iter(loader))
