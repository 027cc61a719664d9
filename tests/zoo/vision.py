"""Image models: a residual CNN with BatchNorm, a ViT, and image captioning."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTForImageClassification,
)

from tests.zoo.entry import Entry, adamw_with_schedule, tokens
from tests.zoo.text import VOCABULARY, LossInside


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(hidden)))


class CNN(pl.LightningModule):
    """A small ResNet with tuple batches."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(16) for _ in range(3)))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(16, 10))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = F.cross_entropy(self.head(self.blocks(self.stem(x))), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return adamw_with_schedule(self)


def _vit(dropout: float) -> pl.LightningModule:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=16,
        patch_size=4, num_channels=3, num_labels=4, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return LossInside(ViTForImageClassification(config))


def _captioner(dropout: float) -> pl.LightningModule:
    encoder = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16,
        patch_size=4, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    decoder = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=4, use_cache=False,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = 0
    config.pad_token_id = 1
    return LossInside(VisionEncoderDecoderModel(config))


def _digit(generator: torch.Generator) -> Any:
    image = torch.randn(1, 8, 8, generator=generator)
    return image, torch.randint(0, 10, (), generator=generator)


def _image(generator: torch.Generator) -> Any:
    return {
        "pixel_values": torch.randn(3, 16, 16, generator=generator),
        "labels": torch.randint(0, 4, (), generator=generator),
    }


def _caption(generator: torch.Generator) -> Any:
    return {
        "pixel_values": torch.randn(3, 16, 16, generator=generator),
        "labels": tokens(generator, 8, VOCABULARY),
    }


VISION = (
    Entry("cnn", CNN, _digit, has_batch_norm=True),
    Entry("vit", _vit, _image),
    Entry("captioner", _captioner, _caption),
)
