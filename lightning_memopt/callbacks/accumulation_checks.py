"""What gradient accumulation asks of a trainer before the first step."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import LBFGS, Optimizer

from lightning_memopt.techniques.batches import batch_size


def find_problem(trainer: pl.Trainer, module: pl.LightningModule) -> str | None:
    """What of the trainer or the module forbids it, as a sentence, or ``None``."""
    if not module.automatic_optimization:
        return (
            f"`{type(module).__name__}` optimizes manually (`automatic_optimization = False`), so only it knows when "
            "to step. Accumulate in `training_step` with `techniques.accumulation.GradientWindow`."
        )
    if trainer.accumulate_grad_batches != 1:
        return (
            f"`Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches})` accumulates too. Leave it at 1 "
            "and give the number to GradientAccumulation."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return f"{type(callback).__name__} accumulates too. Give its schedule to GradientAccumulation instead."
    if isinstance(trainer.strategy, FSDPStrategy):
        return (
            "FSDPStrategy keeps the gradients of an unfinished window where they cannot be rescaled. Use "
            "ModelParallelStrategy (FSDP2), or Lightning's `accumulate_grad_batches`."
        )
    if trainer.strategy.handles_gradient_accumulation:
        return (
            f"{type(trainer.strategy).__name__} accumulates by itself and cannot be told when. Set it in the "
            "strategy's configuration, or use another strategy."
        )
    return None


def find_optimizer_problem(optimizers: Sequence[Optimizer]) -> str | None:
    """What of the optimizers forbids it, as a sentence, or ``None``."""
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        return (
            "LBFGS computes the loss and its gradient several times in a step, each time of the window's last batch "
            "alone, and adds it to what the others left. Give it whole batches (MicroBatching saves their "
            "activations), or use another optimizer."
        )
    return None


def replicas(trainer: pl.Trainer) -> int:
    """How many devices get batches of their own."""
    return (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)


def loader_batch_size(trainer: pl.Trainer) -> int:
    """Samples in a batch of the train loader, or the error that says that it cannot be known."""
    loader = trainer.train_dataloader
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if not isinstance(size, int):
        raise MisconfigurationException(
            f"GradientAccumulation: target_batch_size needs the batch size of the train loader, and a "
            f"{type(loader).__name__} does not tell it (`batch_size`, `batch_sampler.batch_size`); give `schedule`, "
            "the number of batches to accumulate."
        )
    return size


def effective_batch_size(batch: Any, factor: int, devices: int) -> str:
    """The sentence that tells how many samples an optimizer step has."""
    product = f"{factor} accumulated x {devices} device{'s' if devices > 1 else ''}"
    try:
        size = batch_size(batch)
    except ValueError:
        return f"effective batch: {product}"
    return f"effective batch size {size * factor * devices} = {size} x {product}"
