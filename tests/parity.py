"""The parity harness: train twice, once plainly and once with a technique, and compare everything."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from tests.zoo import Entry


@dataclass
class Run:
    """What a training run left behind.

    Attributes:
        losses: The loss of each batch, as Lightning's loop reported it.
        weights: The final ``state_dict``.
        module: The trained module.
        trainer: Its trainer.
    """

    losses: list[float]
    weights: dict[str, torch.Tensor]
    module: pl.LightningModule
    trainer: pl.Trainer


@dataclass
class _RecordLosses(Callback):
    losses: list[float] = field(default_factory=list)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if outputs is not None and "loss" in outputs:
            self.losses.append(float(outputs["loss"]))


def quiet_trainer(steps: int, *callbacks: Callback, **options: Any) -> pl.Trainer:
    """One CPU, and nothing that is printed or written."""
    defaults = {
        "accelerator": "cpu", "devices": 1, "max_steps": steps, "max_epochs": -1, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    return pl.Trainer(callbacks=list(callbacks), **(defaults | options))


def train(
    module: pl.LightningModule,
    loader: DataLoader,
    *,
    steps: int = 20,
    callbacks: Sequence[Callback] = (),
    seed: int = 1234,
    ckpt_path: str | Path | None = None,
    **trainer_options: Any,
) -> Run:
    """Fit ``module`` for ``steps`` optimizer steps on one CPU with everything that writes files switched off."""
    recorder = _RecordLosses()
    trainer = quiet_trainer(steps, *callbacks, recorder, **trainer_options)
    torch.manual_seed(seed)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    weights = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    return Run(recorder.losses, weights, module, trainer)


def assert_same_training(
    plain: Run, other: Run, *, rtol: float = 1e-5, atol: float = 1e-6, compare_losses: bool = True
) -> None:
    """Same losses at every batch, same final weights under the same names, in the same order."""
    assert list(other.weights) == list(plain.weights), "state_dict keys changed"
    if compare_losses:
        assert len(other.losses) == len(plain.losses)
        torch.testing.assert_close(torch.tensor(other.losses), torch.tensor(plain.losses), rtol=rtol, atol=atol)
    for name, weight in plain.weights.items():
        torch.testing.assert_close(
            other.weights[name], weight, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_parity(
    entry: Entry,
    callbacks: Sequence[Callback],
    *,
    dropout: float = 0.0,
    batch_size: int = 8,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    plain_options: dict[str, Any] | None = None,
    **trainer_options: Any,
) -> Run:
    """20 AdamW steps with clipping and an LR schedule, with and without ``callbacks``; returns the second run.

    Clipping is left to Lightning (``gradient_clip_val=0.5``) for modules that it optimizes. ``plain_options``
    replaces ``trainer_options`` in the plain run where the two must differ.
    """
    clipping = {"gradient_clip_val": 0.5} if entry.automatic else {}
    shared = clipping | trainer_options
    plain = train(entry.build(dropout), entry.loader(batch_size=batch_size), **(shared | (plain_options or {})))
    other = train(entry.build(dropout), entry.loader(batch_size=batch_size), callbacks=callbacks, **shared)
    assert_same_training(plain, other, rtol=rtol, atol=atol)
    return other
