"""What the tests of accumulation and micro-batching run on each of two ranks."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from lightning_memopt import GradientAccumulation, MicroBatching
from tests.callbacks.test_accumulation import TokenModel, token_batches
from tests.zoo import ZOO

LENGTHS = (5, 1, 9, 2, 7, 4, 0, 8, 3, 10)


def _rank() -> int:
    return torch.distributed.get_rank()


class _OwnShare(pl.LightningDataModule):
    """Every second batch to each rank, known only once the ranks are."""

    def __init__(self, batches: list[Any]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches[_rank() :: 2], batch_size=None)


def _fit(module: pl.LightningModule, batches: list[Any], *callbacks: Callback, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=_OwnShare(batches))
    return trainer


def token_weights() -> list[list[float]]:
    """The gradients that clipping got: three windows, of 2, 2 and 1 batches on each of two ranks."""
    module = TokenModel()
    callback = GradientAccumulation(2, normalize="tokens", mask_key="labels")
    _fit(module, token_batches(LENGTHS), callback, gradient_clip_val=0.05)
    return [gradient.flatten().tolist() for gradient in module.gradients]


class Failing(TokenModel):
    """Runs out of memory on rank 1 only: in the backward of the third batch, for more than one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.tries: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.tries.append(len(batch["x"]))
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss.nan_to_num(), on_step=True, sync_dist=True)  # a collective, which must wait
        if _rank() == 1 and batch_idx == 2 and len(batch["x"]) > 1:
            loss.register_hook(_out_of_memory)
        return loss


def _out_of_memory(gradient: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. (Not really.)")


def one_rank_runs_out_of_memory() -> dict[str, Any]:
    """Under accumulation, so that gradients are pending when it happens."""
    module = Failing()
    micro = MicroBatching(normalize="tokens", mask_key="labels")
    _fit(module, token_batches(LENGTHS), GradientAccumulation(2, normalize="tokens", mask_key="labels"), micro)
    gradients = [gradient.flatten().tolist() for gradient in module.gradients]
    return {"gradients": gradients, "tries": module.tries, "size": micro.size}


class NeverFits(TokenModel):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if _rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. (Not really.)")
        return super().training_step(batch, batch_idx)


def nothing_fits_on_one_rank() -> str:
    try:
        _fit(NeverFits(), token_batches(LENGTHS), MicroBatching(normalize="tokens", mask_key="labels"))
    except torch.OutOfMemoryError as error:
        return str(error)
    return "no error"


def fixed_size() -> list[float]:
    """An MLP of the zoo in micro-batches of 3 under DDP."""
    entry = ZOO["mlp"]
    trainer = _fit(entry.build(), list(entry.loader(batches=6)), MicroBatching(3))
    return trainer.lightning_module.net[0].weight.flatten().tolist()


def everything() -> dict[str, Any]:
    """All of it in one go, since starting a fit takes longer than its few steps; the crash comes last."""
    scenarios = (token_weights, one_rank_runs_out_of_memory, fixed_size, nothing_fits_on_one_rank)
    return {scenario.__name__: scenario() for scenario in scenarios}
