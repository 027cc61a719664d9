"""Hugging Face text models, random-init from configs: loss inside the model, dict batches."""

from typing import Any

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
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.zoo.entry import Entry, adamw_with_schedule, tokens

VOCABULARY = 64


class LossInside(pl.LightningModule):
    """The usual wrapper: the batch is the model's keyword arguments and the model returns the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.train()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        return adamw_with_schedule(self)


class LossOutside(LossInside):
    """Takes the logits and computes the loss itself, shifting by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        logits = self.model(input_ids=batch["input_ids"]).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def _gpt2(dropout: float) -> pl.LightningModule:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=3, n_head=4, use_cache=False,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LossInside(GPT2LMHeadModel(config))


def _llama(dropout: float) -> pl.LightningModule:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, attention_dropout=dropout, use_cache=False,
    )  # fmt: skip
    return LossOutside(LlamaForCausalLM(config))


def _bert(dropout: float) -> pl.LightningModule:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return LossInside(BertForQuestionAnswering(config))


def _t5(dropout: float) -> pl.LightningModule:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4,
        dropout_rate=dropout, use_cache=False, decoder_start_token_id=0,
    )  # fmt: skip
    return LossInside(T5ForConditionalGeneration(config))


def _mamba(dropout: float) -> pl.LightningModule:
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2, use_cache=False,
        intermediate_size=64, time_step_rank=4,
    )  # fmt: skip
    return LossInside(MambaForCausalLM(config))


def _causal(generator: torch.Generator) -> Any:
    ids = tokens(generator, 16, VOCABULARY)
    return {"input_ids": ids, "labels": ids.clone()}


def _question(generator: torch.Generator) -> Any:
    ids = tokens(generator, 16, VOCABULARY)
    start = int(torch.randint(0, 8, (), generator=generator))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones(16, dtype=torch.long),
        "start_positions": torch.tensor(start),
        "end_positions": torch.tensor(start + 3),
    }


def _translation(generator: torch.Generator) -> Any:
    ids = tokens(generator, 12, VOCABULARY)
    return {"input_ids": ids, "attention_mask": torch.ones(12, dtype=torch.long), "labels": ids.flip(0)[:8]}


TEXT = (
    Entry("gpt2", _gpt2, _causal),
    Entry("llama", _llama, _causal),
    Entry("bert_qa", _bert, _question),
    Entry("t5", _t5, _translation),
    Entry("mamba", _mamba, _causal),
)
