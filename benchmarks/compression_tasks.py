"""What is compressed: scikit-learn's digits with a CNN and a ViT, and the demo's byte language model, all trained."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy

from lightning_memopt.demo.data import Windows, standard_library
from lightning_memopt.demo.model import GPT

CONTEXT = 64


class Classifier(pl.LightningModule):
    """A network, cross-entropy, and accuracy over the whole of the held-out images."""

    def __init__(self, net: nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.net, self.learning_rate = net, learning_rate
        self.accuracy = Accuracy("multiclass", num_classes=10)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("val_accuracy", self.accuracy, on_epoch=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_up_and_decay(step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ViT(nn.Module):
    """A small vision transformer over patches of 2 x 2 pixels."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.blocks(tokens).mean(dim=1))


def cnn(width: int) -> nn.Module:
    """Three convolutions with batch norm, then two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.Flatten(),
        nn.Linear(2 * width * 16, 4 * width), nn.ReLU(), nn.Linear(4 * width, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A module, its data, and how long it trains.

    Attributes:
        name: Of the task.
        build: Makes the LightningModule.
        metric: What it logs.
        is_accuracy: Drops are counted in points of it; otherwise it is a loss, and they are shares of perplexity.
        loaders: Training and validation data.
        epochs: Until it has converged.
        finetune_epochs: After pruning.
    """

    name: str
    build: Callable[[], pl.LightningModule]
    metric: str
    is_accuracy: bool
    loaders: Callable[[], tuple[DataLoader, DataLoader]]
    epochs: int
    finetune_epochs: int

    def fit(self, module: pl.LightningModule, epochs: int, callbacks: Sequence[Callback] = ()) -> pl.Trainer:
        """Train with Lightning, quietly, from a fixed seed."""
        pl.seed_everything(0, verbose=False)
        train, held_out = self.loaders()
        trainer = _trainer(max_epochs=epochs, callbacks=list(callbacks), limit_val_batches=0)
        trainer.fit(module, train, held_out)
        return trainer

    def score(self, module: pl.LightningModule) -> float:
        """The validation metric, by the module's own validation loop."""
        module.eval()
        found = _trainer().validate(module, self.loaders()[1], verbose=False)
        return found[0][self.metric]

    def drop(self, before: float, after: float) -> float:
        """How much worse: points of accuracy, or percent of perplexity."""
        return 100 * ((before - after) if self.is_accuracy else math.expm1(after - before))

    def batch(self, size: int) -> Tensor:
        """Inputs of the network, from the held-out data."""
        samples = [self.loaders()[1].dataset[index] for index in range(size)]
        if self.is_accuracy:
            return torch.stack([image for image, _ in samples])
        return torch.stack(samples)[:, :-1]

    def calibration(self) -> list[Tensor]:
        """Inputs of a few batches of the training data."""
        batches = islice(self.loaders()[0], 16)
        return [batch[0] if self.is_accuracy else batch[:, :-1] for batch in batches]

    def copy(self, module: pl.LightningModule) -> pl.LightningModule:
        """A copy without the trainer."""
        module._trainer = None
        return copy.deepcopy(module)


def tasks(quick: bool) -> dict[str, Task]:
    """The three tasks; ``quick`` ones only show that everything runs."""
    width, layers, epochs = (16, 1, 2) if quick else (64, 4, 40)
    windows = 64 if quick else 8192
    models = {
        "digits_cnn": lambda: Classifier(cnn(width // 2), 3e-3),
        "digits_vit": lambda: Classifier(ViT(2 * width, 4, layers), 1e-3),
    }
    found = {name: Task(name, build, "val_accuracy", True, _digits, epochs, epochs) for name, build in models.items()}
    found["byte_lm"] = Task(
        "byte_lm",
        lambda: GPT(layers, 4 * width, 4, CONTEXT, warmup=20),
        "val_loss",
        False,
        lambda: _text(windows),
        1 if quick else 4,
        1 if quick else 2,
    )
    return found


def _warm_up_and_decay(progress: float) -> float:
    """From 0.04 to 1 in the first tenth, then down to 0.01 along half a cosine, where a resumed run stays."""
    return min(1, 0.04 + 9.6 * progress) * (0.01 + 0.495 * (1 + math.cos(math.pi * min(progress, 1))))


@cache
def _digits() -> tuple[DataLoader, DataLoader]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, train = order[:597], order[597:]
    return (
        DataLoader(TensorDataset(images[train], labels[train]), batch_size=32, shuffle=True),
        DataLoader(TensorDataset(images[held_out], labels[held_out]), batch_size=199),
    )


@cache
def _text(windows: int) -> tuple[DataLoader, DataLoader]:
    corpus = standard_library()
    train = Windows(corpus.training, CONTEXT + 1, windows, seed=0)
    held_out = Windows(corpus.held_out, CONTEXT + 1, max(windows // 16, 64), seed=1)
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(held_out, batch_size=32)


def _trainer(**options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
