"""Let FSDP2 cut from each parameter only the chunk that it keeps.

It cuts as many as there are ranks, twice, and keeps one: of hundreds of ranks that is most of the time of a trace.
The one file that knows how (``_chunk_with_empty`` of ``torch.distributed.fsdp``; tried with torch 2.13).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _Chunks:
    """What ``torch.chunk`` gives, each cut when it is asked for, with empty ones behind it."""

    def __init__(self, tensor: torch.Tensor, count: int, dim: int) -> None:
        self._tensor, self._dim = tensor, dim
        self._size = -(-tensor.size(dim) // count)

    def __getitem__(self, index: int) -> torch.Tensor:
        begin = index * self._size
        length = min(self._size, self._tensor.size(self._dim) - begin)
        if length <= 0 and index > 0:
            return self._tensor.new_empty(0)
        return self._tensor.narrow(self._dim, begin, length)


@contextmanager
def cutting_own_chunks() -> Iterator[None]:
    """Within the block; other versions of torch cut all."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    module: Any = _fsdp_param
    cut_all = getattr(module, "_chunk_with_empty", None)
    if cut_all is None:
        yield
        return
    module._chunk_with_empty = _Chunks
    try:
        yield
    finally:
        module._chunk_with_empty = cut_all
