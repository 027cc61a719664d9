"""Small modules and trainers for tests of what users write in hooks, callbacks and steps."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import lightning_memopt as memopt
from tests.parity import train
from tests.zoo import ZOO


class Net(pl.LightningModule):
    """Blocks, a loss and an optimizer; tests add what is theirs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        hidden = [layer for _ in range(2) for layer in (nn.Linear(32, 32), nn.ReLU())]
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), *hidden, nn.Linear(32, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def small_loader(batches: int = 4) -> DataLoader:
    return ZOO["mlp"].loader(batches, batch_size=8)


def trainer_with(strategy: Any, **options: Any) -> pl.Trainer:
    usual: dict[str, Any] = {
        "accelerator": "cpu", "devices": 2, "max_epochs": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "use_distributed_sampler": False,
    }  # fmt: skip
    return pl.Trainer(strategy=strategy, **(usual | options))


MAKE: dict[str, Callable[[], Any]] = {
    "ddp": lambda: memopt.DataParallelStrategy(),
    "zero1": lambda: memopt.DataParallelStrategy("optimizer"),
    "zero2": lambda: memopt.DataParallelStrategy("gradients"),
    "zero3": lambda: memopt.DataParallelStrategy("parameters"),
    "tp": lambda: memopt.TensorParallelStrategy(),
    "pp": lambda: memopt.PipelineParallelStrategy(microbatches=2),
}


class Checkpoints(pl.LightningModule):
    """Recomputes its blocks with torch's own function, called in the step."""

    def __init__(self, use_reentrant: bool = False, together: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inlet = nn.Linear(16, 32)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 2, 32, dropout=0.0, batch_first=True) for _ in range(4)
        )
        self.outlet = nn.Linear(32, 4)
        self.use_reentrant = use_reentrant
        self.together = together

    def run_blocks(self, first: int, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks[first : first + self.together]:
            hidden = torch.tanh(block(hidden.sin()))
        return hidden

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hidden = self.inlet(batch[0])[:, None]
        for first in range(0, len(self.blocks), self.together):
            hidden = checkpoint(self.run_blocks, first, hidden, use_reentrant=self.use_reentrant)
        return F.cross_entropy(self.outlet(hidden[:, 0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def losses_of(module: pl.LightningModule, ranks: int = 1, strategy: Any = "auto", **options: Any) -> list[float]:
    return train(
        module, small_loader(), steps=6, devices=ranks, strategy=strategy, use_distributed_sampler=False, **options
    ).losses
