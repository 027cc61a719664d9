"""Modules in plain torch: MLP, recurrent net, transformer, shared layers, a GAN, late-built layers."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics import Accuracy

from tests.zoo.entry import Entry, adamw_with_schedule, tokens


class MLP(pl.LightningModule):
    """The tutorial module: tuple batches, loss outside the model."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(16, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> Any:
        return adamw_with_schedule(self)


class MetricsMLP(MLP):
    """Logs a torchmetrics object and returns a dict from ``training_step``."""

    def __init__(self, dropout: float) -> None:
        super().__init__(dropout)
        self.accuracy = Accuracy("multiclass", num_classes=4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.log("train_accuracy", self.accuracy, on_step=True, on_epoch=True)
        return {"loss": F.cross_entropy(logits, y), "logits": logits.detach()}


class LateMLP(pl.LightningModule):
    """Builds its layers in ``configure_model``, as models too large for one host do."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.net: nn.Sequential | None = None

    def configure_model(self) -> None:
        if self.net is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(7)
                self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(self.dropout), nn.Linear(64, 4))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        assert self.net is not None
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return adamw_with_schedule(self)


class Encoder(pl.LightningModule):
    """``nn.TransformerEncoder`` over tokens, with a dict batch."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=3, enable_nested_tensor=False)
        self.head = nn.Linear(32, 4)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        hidden = self.encoder(self.embed(batch["tokens"])).mean(dim=1)
        return F.cross_entropy(self.head(hidden), batch["label"])

    def configure_optimizers(self) -> Any:
        return adamw_with_schedule(self)


class LSTMLanguageModel(pl.LightningModule):
    """A fused recurrent kernel between an embedding and a tied head."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.lstm = nn.LSTM(32, 32, num_layers=2, batch_first=True, dropout=dropout)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        ids = batch["tokens"]
        hidden, _ = self.lstm(self.embed(ids[:, :-1]))
        return F.cross_entropy(self.head(hidden).flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return adamw_with_schedule(self)


class SharedBlock(pl.LightningModule):
    """Calls one block three times in a step, as ALBERT and the Universal Transformer do."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.inlet = nn.Linear(16, 32)
        self.block = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Dropout(dropout))
        self.outlet = nn.Linear(32, 4)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        hidden = self.inlet(x)
        for _ in range(3):
            hidden = hidden + self.block(hidden)
        loss = F.cross_entropy(self.outlet(hidden), y)
        self.log_dict({"train_loss": loss}, prog_bar=True, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return adamw_with_schedule(self)


class GAN(pl.LightningModule):
    """Two optimizers stepped by hand."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
        self.discriminator = nn.Sequential(
            nn.Linear(16, 32), nn.LeakyReLU(0.2), nn.Dropout(dropout), nn.Linear(32, 1)
        )

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, noise = batch["real"], batch["noise"]
        generator_optimizer, discriminator_optimizer = self.optimizers()
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)

        self.toggle_optimizer(generator_optimizer)
        loss = F.binary_cross_entropy_with_logits(self.discriminator(self.generator(noise)), ones)
        generator_optimizer.zero_grad()
        self.manual_backward(loss)
        generator_optimizer.step()
        self.untoggle_optimizer(generator_optimizer)

        self.toggle_optimizer(discriminator_optimizer)
        fake = self.discriminator(self.generator(noise).detach())
        loss = F.binary_cross_entropy_with_logits(self.discriminator(real), ones)
        loss = (loss + F.binary_cross_entropy_with_logits(fake, zeros)) / 2
        discriminator_optimizer.zero_grad()
        self.manual_backward(loss)
        discriminator_optimizer.step()
        self.untoggle_optimizer(discriminator_optimizer)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=1e-3),
            torch.optim.Adam(self.discriminator.parameters(), lr=1e-3),
        ]


def _vector(generator: torch.Generator) -> Any:
    x = torch.randn(16, generator=generator)
    return x, (x[:4].argmax())


def _labelled_tokens(generator: torch.Generator) -> Any:
    ids = tokens(generator, 12, 64)
    return {"tokens": ids, "label": ids[0] % 4}


def _gan(generator: torch.Generator) -> Any:
    return {"real": torch.randn(16, generator=generator), "noise": torch.randn(8, generator=generator)}


PLAIN = (
    Entry("mlp", MLP, _vector),
    Entry("metrics_mlp", MetricsMLP, _vector),
    Entry("late_mlp", LateMLP, _vector),
    Entry("encoder", Encoder, _labelled_tokens),
    Entry("lstm", LSTMLanguageModel, _labelled_tokens),
    Entry("shared_block", SharedBlock, _vector),
    Entry("gan", GAN, _gan, automatic=False),
)
