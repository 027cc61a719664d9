"""The workload of the single-device benchmark: a GPT-2-shaped model on a fixed batch of random tokens."""

import logging
import warnings
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset


class CausalLanguageModel(pl.LightningModule):
    """A Hugging Face causal language model in the wrapper that most users write."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model.train()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch, computed inside the model."""
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


@dataclass(frozen=True)
class Size:
    """Shape of the model and of its batch."""

    layers: int
    width: int
    heads: int
    context: int
    batch_size: int
    vocabulary: int

    def build(self) -> CausalLanguageModel:
        """The model with the same weights each time, dropout off."""
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=self.vocabulary, n_positions=self.context, n_embd=self.width, n_layer=self.layers,
            n_head=self.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
            bos_token_id=0, eos_token_id=1,
            # GPT-2's own function in one kernel. The default writes it out in five operations, each of which saves
            # its input: plain Lightning would take 600 MiB more, and every technique would look better for it.
            activation_function="gelu_pytorch_tanh",
        )  # fmt: skip
        torch.manual_seed(0)
        return CausalLanguageModel(GPT2LMHeadModel(config))

    def batch(self) -> dict[str, Tensor]:
        """Random tokens, ``(batch_size, context)``, the same each time."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.vocabulary, (self.batch_size, self.context), generator=generator)
        return {"input_ids": tokens, "labels": tokens.clone()}


FULL = {vocabulary: Size(12, 256, 8, 256, 16, vocabulary) for vocabulary in (256, 32768)}
"""Sizes by vocabulary."""

QUICK = {vocabulary: Size(2, 32, 2, 32, 16, vocabulary // 4) for vocabulary in FULL}
"""The same rows in seconds: shows that the benchmark runs, its figures mean nothing."""


class Endless(IterableDataset[Any]):
    """One batch, again and again."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __iter__(self) -> Any:
        while True:
            yield self.batch


def loader(batch: Any) -> DataLoader:
    """A loader that hands out ``batch`` as it is, for as long as it is asked."""
    return DataLoader(Endless(batch), batch_size=None)


def trainer(**options: Any) -> pl.Trainer:
    """A trainer that writes and prints nothing."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**(quiet | options))


def preload() -> None:
    """Import what the workers need, once and before they are forked."""
    be_quiet()
    from transformers import GPT2LMHeadModel, LlamaForCausalLM  # noqa: F401


def be_quiet() -> None:
    """Keep the libraries' banners and advice out of a worker's output."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "transformers", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
