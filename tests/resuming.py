"""What tests of callbacks that change training share: a watch, and runs that are interrupted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from tests.parity import quiet_trainer
from tests.zoo import Entry


class Watch(Callback):
    """What ``measure`` says of the module after each optimizer step, as another callback sees it."""

    def __init__(self, measure: Callable[[pl.LightningModule], Any]) -> None:
        self.measure = measure
        self.seen: dict[int, Any] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen[trainer.global_step] = self.measure(module)


class Validations(Callback):
    """What each whole validation logs, by the step after which it ran."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, float]] = {}

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            logged = trainer.callback_metrics
            self.seen[trainer.global_step] = {key: float(logged[key]) for key in logged if key.startswith("val_")}


class SavesAt(Callback):
    """Saves a checkpoint after a step; where it comes first in the list, before the callbacks that are tested."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def fit_same_batches(
    entry: Entry, steps: int, *callbacks: Callback, ckpt_path: Path | None = None, **options: Any
) -> pl.LightningModule:
    """Train on the batches that the whole run sees, also where it is resumed, whatever Lightning skips then."""
    module = entry.build()
    batches = list(entry.loader(steps * options.get("accumulate_grad_batches", 1)))
    step = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        return step(batches[module.trainer.fit_loop.total_batch_idx], batch_idx)

    module.training_step = training_step
    loader = entry.loader(len(batches) // max(1, options.get("max_epochs", 1)))
    torch.manual_seed(0)
    validated = entry.loader(2, seed=1) if "val_check_interval" in options else None
    quiet_trainer(steps, *callbacks, **options).fit(module, loader, validated, ckpt_path=ckpt_path)
    del module.training_step
    return module
