"""The workload of the parallel benchmark: a Llama-shaped model, the same for Lightning and for loops by hand."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from workload import CausalLanguageModel


@dataclass(frozen=True)
class Size:
    """Shape of the model, and of the batch that one rank (or one group that shares a batch) has.

    ``micro_batches`` is what a pipeline cuts the batch into.
    """

    layers: int
    width: int
    heads: int
    context: int
    batch_size: int
    vocabulary: int
    micro_batches: int

    def build_model(self) -> Any:
        """The model with the same weights each time."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.width * 8 // 3 // 8 * 8,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.heads,
            max_position_embeddings=self.context, use_cache=False,
        )  # fmt: skip
        torch.manual_seed(0)
        return LlamaForCausalLM(config).train()

    def build(self) -> CausalLanguageModel:
        """The model in a LightningModule."""
        return CausalLanguageModel(self.build_model())

    def batch(self, seed: int) -> dict[str, Tensor]:
        """Random tokens, ``(batch_size, context)``."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.vocabulary, (self.batch_size, self.context), generator=generator)
        return {"input_ids": tokens, "labels": tokens.clone()}


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of the next token, as the model computes it from its labels."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


FULL = Size(layers=8, width=256, heads=8, context=128, batch_size=8, vocabulary=1024, micro_batches=8)
"""A step takes about a second on one core, so that what is compared is not the loops' own overhead."""

QUICK = Size(layers=2, width=32, heads=2, context=16, batch_size=4, vocabulary=64, micro_batches=2)
"""The same rows in seconds: shows that the benchmark runs, its figures mean nothing."""
