"""Step split or sharded parameters and whole ones with one optimizer."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_TOGETHER = ("foreach", "fused")


@contextmanager
def stepping_mixed(optimizer: Optimizer) -> Iterator[None]:
    """Within the block, groups with both kinds of parameters step them one by one.

    ``foreach`` and ``fused`` put all tensors of a group into one kernel, which takes no mixture; left open,
    ``foreach`` is PyTorch's choice on a GPU. Neither changes what is computed, and the groups have the user's values
    again afterwards, so checkpoints have too.
    """
    before = []
    for group in optimizer.param_groups:
        # Not by their gradients, which the closure of the step is yet to make.
        meshes = {p.device_mesh if isinstance(p, DTensor) else None for p in group["params"] if not p.is_meta}
        if len(meshes) > 1:
            asked = {key: group[key] for key in _TOGETHER if group.get(key, False) is not False}
            before.append((group, asked))
            group.update(dict.fromkeys(asked, False))
    try:
        yield
    finally:
        for group, asked in before:
            group.update(asked)
