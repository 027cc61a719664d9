"""``Trainer(sync_batchnorm=True)`` on CPUs."""

from collections.abc import Callable
from contextlib import ExitStack

import torch.distributed as dist
from lightning.pytorch.plugins.layer_sync import LayerSync
from torch import nn
from typing_extensions import override

from lightning_memopt.parallel.batch_norm import synchronized_batch_norms


class HostSyncBatchNorm(LayerSync):
    """In place of Lightning's, which makes layers of torch's that run on GPUs alone.

    Args:
        find_group: Tells the ranks that have different batches, ``None`` for all; asked when training is set up.
    """

    def __init__(self, find_group: Callable[[], dist.ProcessGroup | None]) -> None:
        self._find_group = find_group
        self._undo = ExitStack()

    @override
    def apply(self, model: nn.Module) -> nn.Module:
        """Synchronize the batch norms of ``model``."""
        self._undo.enter_context(synchronized_batch_norms(model, self._find_group()))
        return model

    @override
    def revert(self, model: nn.Module) -> nn.Module:
        """Give them their classes back."""
        self._undo.close()
        return model
