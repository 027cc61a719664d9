"""Tell storages that are a mapped file from memory that was allocated."""

import torch


def mark_as_mapped(storage: torch.UntypedStorage) -> None:
    """Note that ``storage`` is a file mapped into memory (or, on fake tensors, stands for one).

    Every tensor and view of the storage shows the mark, since torch keeps one Python object per storage.
    """
    storage.is_mapped_file = True  # type: ignore[attr-defined]


def is_mapped(storage: torch.UntypedStorage) -> bool:
    """Whether ``storage`` was marked: its pages are the file's, and no allocator counts them.

    Example:
        >>> tensor = torch.ones(2)
        >>> mark_as_mapped(tensor.untyped_storage())
        >>> is_mapped(tensor.view(1, 2).untyped_storage())
        True
    """
    return getattr(storage, "is_mapped_file", False)
