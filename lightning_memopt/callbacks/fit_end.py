"""Validate a module, or a compressed copy of it, when training is over."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_memopt.compression.latency import Latency, compare_latency


def validate_now(
    trainer: pl.Trainer, module: pl.LightningModule, *, dataloaders: Any = None, batches: int | None = None
) -> dict[str, float]:
    """Run the validation loop of ``module`` within ``on_fit_end`` and return what it logs.

    A trainer of its own runs it, without loggers, callbacks and checkpoints, so that those of ``trainer``, its
    metrics and its progress are not touched. ``setup``, ``teardown`` and ``prepare_data`` of the module are not
    called again. Under several ranks all must call it; each validates its part and the mean is returned.

    Args:
        trainer: The trainer that is at the end of ``fit``.
        module: Its module, or a copy.
        dataloaders: Other data than that of the trainer's validation.
        batches: At most so many of each dataloader; ``None``: as many as the trainer takes.

    Raises:
        MisconfigurationException: There is nothing to validate with.
    """
    require_validation(trainer, module)
    data = trainer.val_dataloaders if dataloaders is None else dataloaders
    device = trainer.strategy.root_device
    inner = pl.Trainer(
        accelerator=device.type, devices=1 if device.type == "cpu" else [device.index or 0], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=trainer.limit_val_batches if batches is None else batches, inference_mode=False,
        plugins=[copy.copy(trainer.precision_plugin)],
    )  # fmt: skip
    with _borrowed(module):
        inner.validate(module, dataloaders=data, verbose=False)
        metrics = {name: float(value) for name, value in inner.callback_metrics.items()}
    if trainer.world_size > 1:
        metrics = {
            name: float(trainer.strategy.reduce(torch.tensor(value, device=device), reduce_op="mean"))
            for name, value in metrics.items()
        }
    return metrics


def require_validation(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Raise where there is no validation loop to run; for ``setup``.

    Raises:
        MisconfigurationException: The module has no ``validation_step``, or no data for it.
    """
    if not is_overridden("validation_step", module):
        raise MisconfigurationException(
            f"{type(module).__name__} has no validation_step, so there is nothing to judge by. Write one that logs a "
            "metric."
        )
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    has_data = source.is_defined() if source.instance is not None else trainer.val_dataloaders is not None
    if not has_data or trainer.limit_val_batches == 0:
        raise MisconfigurationException(
            f"{type(module).__name__} is fitted without validation data, so there is nothing to judge by. Give fit() "
            "val_dataloaders, and leave limit_val_batches above 0."
        )


@contextmanager
def _borrowed(module: pl.LightningModule) -> Iterator[None]:
    """Give the module to another trainer, with its hooks for setting up switched off."""
    owner, names = module._trainer, ("setup", "teardown", "prepare_data")
    kept = {name: vars(module)[name] for name in names if name in vars(module)}
    for name in names:
        setattr(module, name, lambda *_, **__: None)
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for name in names:
            delattr(module, name)
        vars(module).update(kept)
        module._trainer = owner
        for part, training in modes.items():
            part.training = training


def copy_module(module: pl.LightningModule) -> pl.LightningModule:
    """A deep copy of ``module`` and not of the trainer that it is attached to."""
    owner, module._trainer = module._trainer, None
    try:
        return copy.deepcopy(module)
    finally:
        module._trainer = owner


def time_example(trainer: pl.Trainer, before: pl.LightningModule, after: pl.LightningModule) -> tuple[Latency, ...]:
    """Time both, not compiled, on ``before.example_input_array`` and on its first sample, where it is a tensor."""
    inputs = before.example_input_array
    if not isinstance(inputs, torch.Tensor) or not inputs.dim():
        return ()
    precision = trainer.precision_plugin
    inputs = precision.convert_input(inputs.to(before.device))
    modes = {part: part.training for module in (before, after) for part in module.modules()}
    before.eval(), after.eval()
    try:
        with precision.forward_context():
            sizes = sorted({1, len(inputs)})
            return tuple(compare_latency(before, after, inputs[:size], size) for size in sizes)
    finally:
        for part, training in modes.items():
            part.training = training


@dataclass(frozen=True)
class Gate:
    """How much worse a metric may become.

    Attributes:
        max_drop: In the metric's own units; 0.002 is 0.2 points of an accuracy between 0 and 1.
        monitor: Its name, as ``validation_step`` logs it; ``None``: what ``ModelCheckpoint`` monitors.
        mode: ``"max"`` where larger is better.
    """

    max_drop: float
    monitor: str | None = None
    mode: Literal["min", "max"] = "max"

    def __post_init__(self) -> None:
        if not self.max_drop >= 0 or self.mode not in ("min", "max"):
            raise MisconfigurationException(
                f"max_metric_drop={self.max_drop!r} with mode={self.mode!r}: give a drop of at least "
                "0, and 'min' or 'max'."
            )

    def resolved(self, trainer: pl.Trainer) -> "Gate":
        """With the name of a metric.

        Raises:
            MisconfigurationException: Nothing says which.
        """
        if self.monitor is not None:
            return self
        for callback in trainer.checkpoint_callbacks:
            if getattr(callback, "monitor", None) is not None:
                return Gate(self.max_drop, callback.monitor, callback.mode)  # type: ignore[attr-defined]
        raise MisconfigurationException(
            "max_metric_drop is given and no metric: name it with monitor= (and mode=), or have a ModelCheckpoint "
            "monitor it."
        )

    def refusal(self, before: Mapping[str, float], after: Mapping[str, float]) -> str:
        """Why the result is refused; empty where it is not.

        Raises:
            MisconfigurationException: The metric is not among those logged.
        """
        if self.monitor is None or self.monitor not in before or self.monitor not in after:
            raise MisconfigurationException(
                f"monitor={self.monitor!r} is not logged by validation_step, which logs {sorted(before)}."
            )
        old, new = before[self.monitor], after[self.monitor]
        drop = old - new if self.mode == "max" else new - old
        if drop <= self.max_drop:  # false for NaN
            return ""
        return f"{self.monitor} went from {old:.6g} to {new:.6g}, and a drop of {self.max_drop:g} is allowed"
