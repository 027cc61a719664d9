"""Six modules of which a plan's choice is measured: as in the tests' zoo, at a size where memory and time matter."""

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.zoo.entry import adamw_with_schedule
from tests.zoo.text import LossInside, LossOutside
from tests.zoo.vision import ResidualBlock

SAMPLES, VOCABULARY, LENGTH, WIDTH, DEPTH = 16, 2048, 64, 128, 4


class Sized(NamedTuple):
    """How to make a module and one batch for it, the same each time."""

    make: Callable[[], pl.LightningModule]
    make_batch: Callable[[], Any]

    def build(self) -> pl.LightningModule:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make()

    def batch(self) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return self.make_batch()


class Classifier(pl.LightningModule):
    """Tuple batches, the loss outside the model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return adamw_with_schedule(self)


class MeanOverPositions(nn.Module):
    """Between the body and the head of a classifier of sequences."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.mean(dim=1)


def _mlp() -> pl.LightningModule:
    hidden = [layer for _ in range(6) for layer in (nn.Linear(256, 256), nn.GELU(), nn.Dropout(0.1))]
    return Classifier(nn.Sequential(nn.Linear(64, 256), nn.GELU(), *hidden, nn.Linear(256, 10)))


def _encoder() -> pl.LightningModule:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.1, batch_first=True, norm_first=True)
    body = nn.TransformerEncoder(layer, num_layers=DEPTH, enable_nested_tensor=False)
    return Classifier(nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), body, MeanOverPositions(), nn.Linear(WIDTH, 10)))


def _cnn() -> pl.LightningModule:
    blocks = [ResidualBlock(32) for _ in range(4)]
    return Classifier(
        nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
        )
    )


def _gpt2() -> pl.LightningModule:
    return LossInside(
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=WIDTH, n_layer=DEPTH, n_head=4, use_cache=False,
                bos_token_id=0, eos_token_id=1,
            )
        )
    )  # fmt: skip


def _llama() -> pl.LightningModule:
    return LossOutside(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=DEPTH,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH, use_cache=False,
            )
        )
    )  # fmt: skip


def _bert() -> pl.LightningModule:
    return LossInside(
        BertForQuestionAnswering(
            BertConfig(
                vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=4,
                intermediate_size=4 * WIDTH, max_position_embeddings=LENGTH,
            )
        )
    )  # fmt: skip


def _causal() -> Any:
    ids = torch.randint(2, VOCABULARY, (SAMPLES, LENGTH))
    return {"input_ids": ids, "labels": ids.clone()}


def _question() -> Any:
    return {
        "input_ids": torch.randint(2, VOCABULARY, (SAMPLES, LENGTH)),
        "attention_mask": torch.ones(SAMPLES, LENGTH, dtype=torch.long),
        "start_positions": torch.randint(0, 32, (SAMPLES,)),
        "end_positions": torch.randint(32, LENGTH, (SAMPLES,)),
    }


SIZED: dict[str, Sized] = {
    "mlp": Sized(_mlp, lambda: (torch.randn(256, 64), torch.randint(0, 10, (256,)))),
    "encoder": Sized(
        _encoder, lambda: (torch.randint(0, VOCABULARY, (SAMPLES, LENGTH)), torch.randint(0, 10, (SAMPLES,)))
    ),
    "gpt2": Sized(_gpt2, _causal),
    "llama": Sized(_llama, _causal),
    "bert_qa": Sized(_bert, _question),
    "cnn": Sized(_cnn, lambda: (torch.randn(SAMPLES, 3, 32, 32), torch.randint(0, 10, (SAMPLES,)))),
}
