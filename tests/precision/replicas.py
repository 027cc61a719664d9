"""What each rank of ``test_replicas.py`` runs."""

import os
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

import lightning_memopt as memopt
from tests.zoo import ZOO


class _OverflowsOnRank1(type(ZOO["gpt2"].build())):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if self.global_rank == 1 and batch_idx == 2 else loss


def _fit(module: pl.LightningModule, **options: Any) -> None:
    entry = ZOO["gpt2"]
    torch.manual_seed(int(os.environ["LOCAL_RANK"]))  # as where the user seeds nothing
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=4, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(entry.loader(batches=8).dataset, batch_size=8))


def _sums(module: pl.LightningModule) -> list[float]:
    return [float(parameter.double().sum()) for parameter in module.parameters()]


def train() -> dict[str, Any]:
    half = ZOO["gpt2"].build()
    _fit(half, plugins=[memopt.HalfPrecision("bf16", rounding="stochastic")], callbacks=[memopt.ChunkedLoss()])
    mixed = _OverflowsOnRank1(ZOO["gpt2"].build().model)
    plugin = memopt.MixedPrecision("fp16", initial_scale=64.0)
    _fit(mixed, plugins=[plugin])
    return {"half": _sums(half), "mixed": _sums(mixed), "state": plugin.state_dict()}
