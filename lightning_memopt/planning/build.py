"""Make a module where its parameters take no memory, or, where building it reads values, for real if it is small."""

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_memopt.memory.report import format_bytes
from lightning_memopt.models.lazy import refuse_uninitialized
from lightning_memopt.planning.fake import fake_copy
from lightning_memopt.planning.values import ReadsValues, explain_reads_of_values

SMALL_BYTES = 2**30
"""What may be made, or run, with real tensors because it cannot be with fake ones."""


def build_fake(make: Callable[[], Any], mode: FakeTensorMode) -> Any:
    """What ``make`` makes, with fakes of ``mode`` for its tensors.

    Raises:
        ReadsValues: It reads values while it is made (``[x.item() for x in torch.linspace(...)]``) and is not small.
        ValueError: Parameters of it have no shape when it is made.
    """
    instead = (
        f"made with real tensors it takes more than {format_bytes(SMALL_BYTES)}; compute that value without tensors, "
        "or give the module itself, made on the meta device"
    )
    try:
        with explain_reads_of_values("the function that makes the module cannot run on fake tensors", instead), mode:
            return make()
    except (ReadsValues, RuntimeError) as refusal:
        if "Couldn't swap" in str(refusal):  # torch cannot cast fake parameters in place, as `.bfloat16()` does
            with torch.device("meta"):
                return fake_copy(mode, make())
        # A parameter without a shape (of `nn.LazyLinear`) cannot be fake; when the module is made it may have one.
        if not isinstance(refusal, ReadsValues) and "UninitializedParameter" not in str(refusal):
            raise
        try:
            with _UpTo(SMALL_BYTES):
                made = make()
        except MemoryError:
            raise refusal from None
    if isinstance(made, torch.nn.Module):
        refuse_uninitialized(made)
    return fake_copy(mode, made)


class _UpTo(TorchDispatchMode):
    """Ends what allocates more than so many bytes."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__()
        self._left = most_bytes
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in self._seen:
                    self._seen.add(storage.data_ptr())
                    self._left -= storage.nbytes()
        if self._left < 0:
            raise MemoryError
        return result
