"""Offload activations for any LightningModule."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_memopt.techniques.offload import MIN_BYTES, ActivationStore, Destination


class ActivationOffload(Callback):
    """Keep what autograd saves in a training step in host memory or in files until the backward needs it.

    Losses, gradients and dropout masks are bit for bit those of plain training. With
    :class:`~lightning_memopt.callbacks.checkpointing.ActivationCheckpointing` the inputs of the recomputed blocks are
    offloaded.

    Args:
        to: ``"cpu"``: pinned host memory, for training on a CUDA device. ``"disk"``: files, the only thing that saves
            memory when training on a CPU.
        min_bytes: Smaller storages stay on the device.
        directory: For ``"disk"``: an existing folder on a local disk; the system's temporary folder by default.

    Raises:
        MisconfigurationException: Bad arguments, when made; at fit start, ``to="cpu"`` for training on a CPU.
        OffloadError: While training, the disk is full, or the folder is gone; the message says what to do.

    Source:
        Rhu et al. 2016 (https://arxiv.org/abs/1602.08124).

    Example:
        >>> trainer = pl.Trainer(callbacks=[ActivationOffload("disk", min_bytes=2**16)], logger=False)
    """

    def __init__(
        self, to: Destination = "cpu", *, min_bytes: int = MIN_BYTES, directory: str | Path | None = None
    ) -> None:
        self._arguments = (to, min_bytes, directory)
        self._store: ActivationStore | None = None
        self._hooks: AbstractContextManager[None] | None = None
        self._make_store()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._store = self._make_store()
        self._hooks_of(pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._leave_hooks()
        self._hooks = self._hooks_of(pl_module)
        self._hooks.__enter__()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._leave_hooks()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    def __getstate__(self) -> dict[str, Any]:
        # Copies of the callback (spawned processes) start with no open store.
        return {**self.__dict__, "_store": None, "_hooks": None}

    def _make_store(self) -> ActivationStore:
        try:
            return ActivationStore(*self._arguments)
        except ValueError as error:
            raise MisconfigurationException(f"ActivationOffload: {error}.") from error

    def _hooks_of(self, module: pl.LightningModule) -> AbstractContextManager[None]:
        assert self._store is not None
        try:
            return self._store.hooks(module)
        except ValueError as error:
            raise MisconfigurationException(f"ActivationOffload: {error}.") from error

    def _leave_hooks(self) -> None:
        # Also before a batch: a callback that skips a batch ends it without on_train_batch_end.
        if self._hooks is not None:
            self._hooks.__exit__(None, None, None)
            self._hooks = None

    def _close(self) -> None:
        self._leave_hooks()
        if self._store is not None:
            self._store.close()
            self._store = None
