"""Keep out of traces what DTensor computes on fake tensors of its own, to learn the shapes of results.

Adapter for ``torch.distributed.tensor``, private. torch 2.11 does so in every step that runs on fake tensors, and on
whole ones: no rank has or computes them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def unseen_propagation() -> Iterator[None]:
    """Within the block no dispatch mode sees it."""
    cls: Any = ShardingPropagator
    propagate = cls._propagate_tensor_meta_non_cached

    def unseen(propagator: ShardingPropagator, *args: Any) -> Any:
        with _disable_current_modes():
            return propagate(propagator, *args)

    cls._propagate_tensor_meta_non_cached = unseen
    try:
        yield
    finally:
        cls._propagate_tensor_meta_non_cached = propagate
