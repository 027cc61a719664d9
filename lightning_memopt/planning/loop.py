"""Run Lightning's own loop on one batch until one optimizer step, not the first, is measured."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils._python_dispatch import _pop_mode_temporarily

from lightning_memopt.memory.report import MemoryReport
from lightning_memopt.memory.track import track_memory
from lightning_memopt.memory.workspace import Need
from lightning_memopt.models.instance_patch import replaced
from lightning_memopt.planning.operators import OperatorLog
from lightning_memopt.planning.quiet import quiet_lightning
from lightning_memopt.techniques.batches import batch_size, tensors_in

_MAX_BATCHES = 1000
"""A loop that takes more batches than this for two optimizer steps is taken for one that never steps."""

_QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "max_epochs": 1,
}


class _SameBatch:
    """A loader of one batch, again and again."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch
        with suppress(ValueError):  # for what asks the loader, as `GradientAccumulation(target_batch_size=...)` does
            self.batch_size = batch_size(batch)

    def __iter__(self) -> Iterator[Any]:
        for _ in range(_MAX_BATCHES):
            yield self._batch

    def __len__(self) -> int:
        return _MAX_BATCHES


class StayInPlace(SingleDeviceStrategy):
    """Leaves the module where it is: fake parameters can be moved nowhere."""

    def model_to_device(self) -> None:
        """Nothing."""


class _MeasureStep(Callback):
    """Lets the report begin before an optimizer step that finds the optimizer's state and end after it.

    That is the second; or the first, with ``prepares``, which makes the state without forward and backward. Then it
    ends the fit.
    """

    tracker: track_memory

    def __init__(self, log: OperatorLog | None, prepares: bool) -> None:
        self._log = log
        self._prepares = prepares
        self._steps_before: int | None = None
        self.is_done = False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for config in trainer.lr_scheduler_configs:
            config.strict = False  # a ReduceLROnPlateau goes by what no validation, or no fake tensor, logs here
        # The gradients stay, as those of the step before do until Lightning sets them to None after the forward.
        if self._prepares:
            with _pop_mode_temporarily():  # the tracker, which is told of what is there when the report begins
                for optimizer in trainer.optimizers:
                    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                        if parameter.requires_grad and parameter.device.type != "meta":  # those are on another stage
                            parameter.grad = torch.zeros_like(parameter)
                    optimizer.step()

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._steps_before is None and (self._prepares or trainer.global_step > 0):
            self._steps_before = trainer.global_step
            self.tracker.restart(module, list(trainer.optimizers), tensors_in(batch))
            if self._log is not None:
                self._log.start()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not self.is_done and self._steps_before is not None and trainer.global_step > self._steps_before:
            self.tracker.end_report()
            if self._log is not None:
                self._log.stop()
            self.is_done = True
            trainer.should_stop = True


def run_second_step(
    module: pl.LightningModule,
    batch: Any,
    callbacks: Sequence[Callback],
    trainer_options: dict[str, Any],
    *,
    log: OperatorLog | None = None,
    timeline_points: int = 1000,
    known_kernels: dict[str, Need] | None = None,
    gpu_granularity: int | None = None,
    prepares: bool = False,
) -> MemoryReport:
    """Fit ``module`` on ``batch`` until its second optimizer step is done, and report that step.

    The second, because optimizers make their state in the first. All micro-batches of an accumulation window belong
    to a step.

    Args:
        module: A module of its own, that nobody else uses; it is trained.
        batch: One batch of its training loader.
        callbacks: For the trainer.
        trainer_options: Arguments of ``pl.Trainer``, over those that keep it quiet.
        log: Lists the operators of that step; the caller has entered it.
        timeline_points: The most points that the report's timeline has.
        known_kernels: As for :class:`~lightning_memopt.memory.track.track_memory`.
        gpu_granularity: As for :class:`~lightning_memopt.memory.track.track_memory`.
        prepares: Take the first step, before which the optimizers step on gradients that no backward made: for runs
            on fake tensors, of modules and optimizers for which it makes no difference.

    Raises:
        ValueError: The loop does not step an optimizer.
    """
    with quiet_lightning():
        watcher = _MeasureStep(log, prepares)
        trainer = pl.Trainer(**(_QUIET | trainer_options), callbacks=[watcher, *callbacks])
        watcher.tracker = tracker = track_memory(
            module,
            tensors_in(batch),
            timeline_points=timeline_points,
            known_kernels=known_kernels,
            gpu_granularity=gpu_granularity,
            device=trainer.strategy.root_device,  # where the fit moves the module, which may be elsewhere yet
        )
        own_callbacks = partial(_measurable_callbacks, module.configure_callbacks)
        with tracker, replaced(module, configure_callbacks=own_callbacks):
            trainer.fit(module, _SameBatch(batch))
    if not watcher.is_done:
        raise ValueError(
            f"{type(module).__name__} stepped its optimizer fewer than twice in {_MAX_BATCHES} batches, so there is "
            "no step to measure; training_step must return a loss, or step an optimizer by hand"
        )
    return tracker.report()


def _measurable_callbacks(configure_callbacks: Callable[[], Any]) -> list[Callback]:
    """The module's own callbacks without those that would write files, or look for what no validation logs."""
    own = configure_callbacks() or []
    callbacks = own if isinstance(own, Sequence) else [own]
    return [callback for callback in callbacks if not isinstance(callback, Checkpoint | EarlyStopping)]
