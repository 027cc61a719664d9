"""Lightning's plugin for reading and writing checkpoints, with writes that are whole or not at all."""

import os
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from lightning_memopt.checkpoints.atomic import save_file
from lightning_memopt.checkpoints.sharded import ShardedCheckpoint, is_sharded


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves under a temporary name, syncs, and renames, so that a checkpoint is whole or not there.

    All strategies of this package use it unless they are given another. A full disk fails with the bytes needed and
    free, removes what was written, and leaves the older checkpoint under the same name whole. The file is written as
    it is made, where Lightning first makes all of it in memory. Reads files as Lightning does, and sharded
    directories as well. Addresses of object stores (``s3://...``), which have no half-written objects, are left to
    Lightning.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(plugins=[AtomicCheckpointIO()], accelerator="cpu", logger=False)
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            save_file(checkpoint, path)

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not is_remote(path) and is_sharded(path):
            return ShardedCheckpoint(path).checkpoint()
        return super().load_checkpoint(path, *args, **kwargs)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is an address that a file system other than this machine's knows."""
    return "://" in os.fspath(path)
