"""Train the demo's GPT plainly and with techniques, from the same seed on the same batches, and record both."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_memopt as memopt
from lightning_memopt.demo.data import Corpus, Windows
from lightning_memopt.demo.model import GPT
from lightning_memopt.demo.presets import Preset
from lightning_memopt.demo.techniques import callbacks
from lightning_memopt.planning.quiet import quiet_lightning

WARM_UP_STEPS = 3
"""Steps that are not timed: the first ones also allocate optimizer state and warm the caches."""

Progress = Callable[[str, int, str], None]
"""Called with the run's name, how many of its steps are done, and what it does now or has just found."""


@dataclass(frozen=True)
class Outcome:
    """What one run cost and how well it learned.

    Attributes:
        name: ``"plain"`` or ``"memopt"``.
        techniques: Names of the techniques that were on.
        measured: Memory of one optimizer step, measured before the training.
        predicted: The same, predicted from fake tensors.
        seconds_per_step: Median over the steps of the training, without the first few.
        training_losses: Loss of each step, in nats per byte.
        validation_loss: On the held-out files after the last step, in nats per byte.
        module: As it was trained.
    """

    name: str
    techniques: tuple[str, ...]
    measured: memopt.MemoryReport
    predicted: memopt.MemoryReport
    seconds_per_step: float
    training_losses: tuple[float, ...]
    validation_loss: float
    module: GPT


def run(
    name: str,
    preset: Preset,
    corpus: Corpus,
    *,
    techniques: Sequence[str] = (),
    steps: int,
    seed: int,
    progress: Progress = lambda run, done, text: None,
) -> Outcome:
    """Predict and measure the memory of one step, then train and validate.

    Args:
        name: Name of the run.
        preset: Size of the model and of the data.
        corpus: The text.
        techniques: Names of the techniques to switch on.
        steps: Optimizer steps, at least 1.
        seed: Seed of weights and batches.
        progress: Told of every step.
    """
    batches = Windows(corpus.training, preset.context + 1, steps * preset.batch_size, seed)
    training = DataLoader(batches, batch_size=preset.batch_size)
    batch: Tensor = next(iter(training))

    with quiet_lightning():
        progress(name, 0, "memory of one step, predicted")
        predicted = memopt.predict_memory(_build(preset, seed), batch, callbacks=callbacks(techniques, preset))
        progress(name, 0, "memory of one step, measured")
        measured = memopt.measure_memory(_build(preset, seed), batch, callbacks=callbacks(techniques, preset))

        module = _build(preset, seed)
        watch = _Watch(name, progress)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            callbacks=[*callbacks(techniques, preset), watch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        progress(name, 0, "training")
        trainer.fit(module, training)
        validation_loss = validate(module, preset, corpus, seed)
    timed = watch.seconds[WARM_UP_STEPS:] or watch.seconds
    return Outcome(
        name, tuple(techniques), measured, predicted, median(timed), tuple(watch.losses), validation_loss, module
    )


def validate(module: GPT, preset: Preset, corpus: Corpus, seed: int) -> float:
    """Loss on the held-out files, in nats per byte."""
    held_out = Windows(corpus.held_out, preset.context + 1, preset.validation_batches * preset.batch_size, seed)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    loader = DataLoader(held_out, batch_size=preset.batch_size)
    return float(trainer.validate(module, loader, verbose=False)[0]["val_loss"])


def _build(preset: Preset, seed: int) -> GPT:
    torch.manual_seed(seed)
    return GPT(preset.layers, preset.width, preset.heads, preset.context)


class _Watch(Callback):
    """Time and loss of each step, and a word to the progress bar.

    The clock runs from batch to batch: that counts what a technique does between the batches too, and the data,
    which is next to nothing here.
    """

    def __init__(self, name: str, progress: Progress) -> None:
        self.name = name
        self.progress = progress
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._since = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self.losses.append(float(outputs["loss"]))
        self.progress(self.name, len(self.losses), f"loss {self.losses[-1]:.2f}")
        self._since = time.perf_counter()
