"""A small GPT as a user would write it: plain torch in a LightningModule, nothing of this package in it."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256
"""Byte level: one token per byte value."""


class Attention(nn.Module):
    """Causal self-attention over ``(batch, context, width)``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to this and all earlier positions; the shape stays."""
        batch, context, width = x.shape
        heads = (batch, context, self.heads, width // self.heads)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.queries_keys_values(x).split(width, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(batch, context, width))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Add attention, then the feed-forward part, to the residual stream."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(pl.LightningModule):
    """A byte-level language model whose head is tied to its embedding.

    Args:
        layers: Transformer blocks.
        width: Size of the residual stream; ``heads`` divides it.
        heads: Attention heads.
        context: The longest input, in bytes.
        learning_rate: AdamW's, after ``warmup`` steps.
        warmup: Steps over which the learning rate rises.
    """

    def __init__(
        self, layers: int, width: int, heads: int, context: int, learning_rate: float = 1e-3, warmup: int = 10
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # so that what it became can be loaded by itself
        self.learning_rate = learning_rate
        self.warmup = warmup
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.apply(_initialize)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next byte.

        Args:
            tokens: Byte values, ``(batch, context)``, int64.

        Returns:
            ``(batch, context, 256)``.
        """
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean cross-entropy in nats per byte of one batch of windows, ``(batch, context + 1)``."""
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the same on held-out windows."""
        self.log("val_loss", self._loss(batch))

    def configure_optimizers(self) -> Any:
        """AdamW with a linear warm-up."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.95))
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}

    def _loss(self, windows: Tensor) -> Tensor:
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
