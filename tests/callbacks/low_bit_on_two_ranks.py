"""What the tests of LowBitOptimizer run on each of two ranks."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_memopt import LowBitOptimizer
from tests.zoo import ZOO


class _OwnShare(pl.LightningDataModule):
    """Every second batch to each rank, known only once the ranks are."""

    def train_dataloader(self) -> DataLoader:
        batches = list(ZOO["mlp"].loader(batches=20))
        return DataLoader(batches[torch.distributed.get_rank() :: 2], batch_size=None)


def final_weights() -> list[float]:
    """The weights of the layer that is large enough to have packed state, after ten steps under DDP."""
    module = ZOO["mlp"].build()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[LowBitOptimizer(8)],
    )  # fmt: skip
    trainer.fit(module, datamodule=_OwnShare())
    return module.net[3].weight.flatten().tolist()
