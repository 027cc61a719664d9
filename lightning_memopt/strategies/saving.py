"""How every strategy saves and loads: one file, or a directory to which each rank writes its shards."""

from abc import abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_memopt.checkpoints.atomic import remove
from lightning_memopt.checkpoints.sharded import ShardedCheckpoint, is_sharded
from lightning_memopt.checkpoints.write_sharded import (
    on_rank_zero,
    save_sharded,
    save_sharded_async,
    split_checkpoint,
)
from lightning_memopt.parallel.gather import (
    gather_module_state,
    gather_optimizer_state,
    shard_module_state,
    shard_optimizer_state,
)
from lightning_memopt.strategies.checkpoint_io import AtomicCheckpointIO, is_remote

_KINDS = ("full", "sharded", "async")


class SavingStrategy(DDPStrategy):
    """Saves checkpoints that any strategy loads, at any number of ranks.

    Args:
        save: ``"full"``: one file, as one device would save it, gathered and written by rank 0. ``"sharded"``: a
            directory to which each rank writes what it holds. ``"async"``: likewise, while training goes on; the
            checkpoint is there once it is whole, at the latest when the next one is saved or ``fit`` ends.
        **options: What Lightning's ``DDPStrategy`` takes.
    """

    @property
    @abstractmethod
    def splits_module(self) -> bool:
        """Whether ranks hold different parts of one module while it trains."""

    def __init__(self, save: Literal["full", "sharded", "async"] = "full", **options: Any) -> None:
        if save not in _KINDS:
            raise MisconfigurationException(f"save={save!r} is none of {', '.join(map(repr, _KINDS))}.")
        super().__init__(**options)
        self.save = save
        self._pending: Future[Any] | None = None
        self._superseded: list[Path] = []
        self._runs = False

    # What is put into a checkpoint

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        if self.save == "full" and not self.splits_module:
            return super().lightning_module_state_dict()
        return self.state_of(self.lightning_module)

    def state_of(self, module: nn.Module) -> dict[str, Any]:
        """What of ``module``, of which this rank may hold parts, goes into a checkpoint; all ranks together."""
        if self.save == "full":
            return gather_module_state(module, keep=self.is_global_zero)
        state = module.state_dict(keep_vars=True)  # the parameters themselves, so that tied ones stay one
        values = {id(value): value.detach() if isinstance(value, Tensor) else value for value in state.values()}
        return {name: values[id(value)] for name, value in state.items()}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        if self.save != "full":
            return optimizer.state_dict()
        if not self.splits_module:
            return super().optimizer_state(optimizer)
        return gather_optimizer_state(optimizer, keep=self.is_global_zero)

    # Saving

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        elif isinstance(self._checkpoint_io, _WrappingCheckpointIO) and self._checkpoint_io.checkpoint_io is None:
            self._checkpoint_io.checkpoint_io = AtomicCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint``, and fail on all ranks where one cannot: the others would wait for it for ever."""
        if self.save == "full":
            io = self.checkpoint_io
            on_rank_zero(filepath, lambda: io.save_checkpoint(checkpoint, filepath, storage_options=storage_options))
            return
        if is_remote(filepath):
            raise MisconfigurationException(
                f"`{filepath}` is no directory of this machine, where alone sharded checkpoints can be made whole or "
                'not at all: save to a disk that all ranks share, or with `save="full"`.'
            )
        assert self.lightning_module is not None
        path = Path(filepath)
        tensors, rest = split_checkpoint(checkpoint, self.lightning_module, self.optimizers)
        self._finish_pending()
        if self.save == "sharded" or not self._runs:  # after `fit` nothing would wait for it
            save_sharded(tensors, rest, path)
        else:
            self._pending = save_sharded_async(tensors, rest, path, self._async_group)

    @cached_property
    def _async_group(self) -> dist.ProcessGroup | None:
        return dist.new_group(backend="gloo")  # made by all ranks together, when they first save

    def _finish_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
        for path in self._superseded:
            remove(path)
        self._superseded.clear()

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        if self._pending is None or is_remote(filepath):
            super().remove_checkpoint(filepath)
        elif self.is_global_zero:
            self._superseded.append(Path(filepath))  # the one that takes its place is not there yet

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        self._runs = True

    @override
    def teardown(self) -> None:
        self._runs = False
        if not getattr(self, "_failed", False):  # where a rank failed, its part may never come
            self._finish_pending()
        super().teardown()

    # Loading

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        if not is_remote(checkpoint_path) and is_sharded(checkpoint_path):
            return ShardedCheckpoint(checkpoint_path, weights_only is not False).checkpoint(lazily=True)
        return super().load_checkpoint(checkpoint_path, weights_only=weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self.splits_module:
            assert self.lightning_module is not None
            state = shard_module_state(checkpoint["state_dict"], self.lightning_module)
            checkpoint = {**checkpoint, "state_dict": state}
        super().load_model_state_dict(checkpoint, strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(shard_optimizer_state(state, optimizer))
        _optimizers_to_device(self.optimizers, self.root_device)
