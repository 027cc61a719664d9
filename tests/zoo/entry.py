"""What the zoo lists: how to build a module and the data it trains on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset


class Samples(Dataset):
    """A fixed list of samples, made once from a seed."""

    def __init__(self, sample: Callable[[torch.Generator], Any], count: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.samples = [sample(generator) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


@dataclass(frozen=True)
class Entry:
    """One module of the zoo.

    Attributes:
        name: Its key in ``ZOO``.
        make: Builds the module; ``dropout`` is the rate wherever the module has dropout.
        sample: Draws one sample of its dataset.
        automatic: Whether Lightning drives the optimizers.
        has_batch_norm: Whether splitting a batch changes its statistics.
    """

    name: str
    make: Callable[[float], pl.LightningModule]
    sample: Callable[[torch.Generator], Any]
    automatic: bool = True
    has_batch_norm: bool = False

    def build(self, dropout: float = 0.0, seed: int = 0) -> pl.LightningModule:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make(dropout)

    def loader(self, batches: int = 20, batch_size: int = 8, seed: int = 0) -> DataLoader:
        return DataLoader(Samples(self.sample, batches * batch_size, seed), batch_size=batch_size)

    def batch(self, batch_size: int = 8, seed: int = 0) -> Any:
        return next(iter(self.loader(1, batch_size, seed)))


def adamw_with_schedule(module: pl.LightningModule, lr: float = 1e-3) -> dict[str, Any]:
    """AdamW and a per-step warm-up and decay: what most users return from ``configure_optimizers``."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 4) * max(0.1, 1 - step / 40)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def tokens(generator: torch.Generator, length: int, vocabulary: int, low: int = 2) -> torch.Tensor:
    return torch.randint(low, vocabulary, (length,), generator=generator)
