"""Lightning's own callbacks and switches of the trainer do under every strategy what they do on one device."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset
from torch.utils.data.distributed import DistributedSampler

from tests.distributed import run_on_ranks
from tests.strategies.users import MAKE, Net, small_loader, trainer_with

pytestmark = pytest.mark.distributed


class _Thaw(BaseFinetuning):
    """Trains the last layer, and the others from the second epoch on."""

    def freeze_before_training(self, module: pl.LightningModule) -> None:
        self.freeze(module.net[:-1])

    def finetune_function(self, module: pl.LightningModule, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net[:-1], optimizer, initial_denom_lr=2)


class _Frozen(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


def _weights(module: pl.LightningModule) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def _thawed(make: Callable[[], Any], devices: int, folder: Path) -> list[torch.Tensor]:
    """Three epochs, of which the third is resumed."""
    trainer = trainer_with(make(), devices=devices, max_epochs=2, callbacks=[_Thaw()])
    trainer.fit(_Frozen(), small_loader())
    trainer.save_checkpoint(folder / "thawed.ckpt")
    module = _Frozen()
    trainer = trainer_with(make(), devices=devices, max_epochs=3, callbacks=[_Thaw()])
    trainer.fit(module, small_loader(), ckpt_path=folder / "thawed.ckpt", weights_only=False)
    return _weights(module)


@pytest.mark.parametrize("strategy", ["zero1", "zero3", "tp", "pp"])
def test_layers_that_a_callback_unfreezes_train_and_resume_as_on_one_device(strategy: str, tmp_path: Path) -> None:
    own_filter = BaseFinetuning.__dict__["filter_on_optimizer"]
    (plain,) = run_on_ranks(lambda: _thawed(lambda: "auto", 1, tmp_path), 1)

    def thawed() -> list[torch.Tensor]:
        weights = _thawed(MAKE[strategy], 2, tmp_path)
        assert BaseFinetuning.__dict__["filter_on_optimizer"] is own_filter
        return weights

    for weights in run_on_ranks(thawed, 2):
        torch.testing.assert_close(weights, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_gradients_of_layers_that_a_callback_unfreezes_are_of_all_ranks_batches(strategy: str) -> None:
    def fit(ranks: int, make: Callable[[], Any]) -> list[torch.Tensor]:
        dataset = small_loader().dataset
        sampler = DistributedSampler(dataset, ranks, int(os.environ["LOCAL_RANK"]), shuffle=False)
        trainer = trainer_with(make(), devices=ranks, max_epochs=2, callbacks=[_Thaw()])
        trainer.fit(module := _Frozen(), DataLoader(dataset, batch_size=8 // ranks, sampler=sampler))
        return _weights(module)

    (plain,) = run_on_ranks(lambda: fit(1, lambda: "auto"), 1)
    for weights in run_on_ranks(lambda: fit(2, MAKE[strategy]), 2):
        torch.testing.assert_close(weights, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["zero3", "tp", "pp"])
def test_anomalies_are_detected_under_every_strategy(strategy: str) -> None:
    def train() -> list[torch.Tensor]:
        module = Net()
        trainer_with(MAKE[strategy](), detect_anomaly=True).fit(module, small_loader())
        return _weights(module)

    module = Net()
    trainer_with("auto", devices=1).fit(module, small_loader())
    for weights in run_on_ranks(train, 2):
        torch.testing.assert_close(weights, _weights(module), rtol=1e-5, atol=1e-6)


class _Plateaus(Net):
    """Lowers its learning rate by a loss that each rank logs for itself."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_ranks_lower_the_learning_rate_together_where_each_logs_the_loss_of_its_own_batches(strategy: str) -> None:
    def fit() -> tuple[list[torch.Tensor], list[float]]:
        losses: list[float] = []
        rank = int(os.environ["LOCAL_RANK"])
        validated = DataLoader(Subset(small_loader().dataset, range(16 * rank, 16 * rank + 16)), batch_size=8)

        class Judges(_Plateaus):
            def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
                losses.append(float(metric))
                scheduler.step(metric)

        trainer = trainer_with(MAKE[strategy](), max_epochs=4)
        trainer.fit(module := Judges(), small_loader(), validated)
        assert losses[-1] != float(trainer.callback_metrics["loss"])
        return _weights(module), losses

    (first, losses), (second, others) = run_on_ranks(fit, 2)
    assert losses == others
    torch.testing.assert_close(first, second, rtol=0, atol=0)
