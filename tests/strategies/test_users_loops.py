"""What users build around a module (loaders, optimizers, command lines, Hugging Face's switches) under strategies."""

import os
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import CombinedLoader
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from tests.distributed import run_on_ranks
from tests.strategies.users import MAKE, Net, small_loader, trainer_with

SHARED = ("tp", "pp")
"""Strategies of which all ranks have the same batches."""


def each(*quick: str, refused: tuple[str, ...] = ()) -> Any:
    names = [name for name in MAKE if name not in refused]
    return pytest.mark.parametrize(
        "strategy", [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]
    )


def dealt_out(loader: DataLoader, strategy: str) -> DataLoader:
    if strategy == "auto" or strategy in SHARED:
        return loader
    sampler = DistributedSampler(loader.dataset, 2, int(os.environ["LOCAL_RANK"]), shuffle=False)
    return DataLoader(loader.dataset, batch_size=(loader.batch_size or 2) // 2, sampler=sampler)


def assert_trains_as_one_device(
    strategy: str, module: Callable[[], pl.LightningModule], loaders: Callable[[str], Any], **options: Any
) -> None:
    def fit(strategy: str, ranks: int) -> tuple[list[np.ndarray], dict[str, float]]:
        make = MAKE.get(strategy, lambda: strategy)
        trainer = trainer_with(make(), devices=ranks, **options)
        trainer.fit(trained := module(), *loaders(strategy))
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return [p.detach().numpy() for p in trained.parameters()], metrics

    ((plain, plain_metrics),) = run_on_ranks(fit, 1, "auto", 1)
    for weights, metrics in run_on_ranks(fit, 2, strategy, 2):
        for ours, theirs in zip(weights, plain, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        assert metrics == pytest.approx(plain_metrics, rel=1e-4)


class StepsInHooks(Net):
    """Steps two optimizers of its own where a batch has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.manual_backward(loss := super().training_step(batch, batch_idx))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD(self.net[:3].parameters(), lr=0.1, momentum=0.9)
        return [first, torch.optim.SGD(self.net[3:].parameters(), lr=0.1)]


@each("zero3", "tp", refused=("pp",))
def test_two_optimizers_that_a_hook_steps_train_as_on_one_device(strategy: str) -> None:
    assert_trains_as_one_device(strategy, StepsInHooks, lambda to: (dealt_out(small_loader(), to),))


class StepsOneByHand(Net):
    """Leaves one optimizer to Lightning and steps another."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.by_hand.step()
        self.by_hand.zero_grad()

    def configure_optimizers(self) -> Any:
        self.by_hand = torch.optim.SGD(self.net[3:].parameters(), lr=0.1)
        return torch.optim.SGD(self.net[:3].parameters(), lr=0.1)


@each("zero3", "pp")
def test_an_optimizer_that_a_hook_steps_beside_lightnings_trains_as_on_one_device(strategy: str) -> None:
    assert_trains_as_one_device(strategy, StepsOneByHand, lambda to: (dealt_out(small_loader(), to),))


class HasTwoLoaders(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = [F.cross_entropy(self(part[0]), part[1]) for part in batch.values() if part is not None]
        return sum(losses)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@each("zero3", "tp", refused=("pp",))  # which runs a model once in a step
def test_batches_of_several_loaders_train_as_on_one_device(strategy: str) -> None:
    def loaders(to: str) -> Any:
        long, short = dealt_out(small_loader(4), to), dealt_out(small_loader(2), to)
        return CombinedLoader({"long": long, "short": short}, "max_size"), CombinedLoader([long, short], "sequential")

    assert_trains_as_one_device(strategy, HasTwoLoaders, loaders)


class Writes(pl.LightningModule):
    """A language model that recomputes by its own switch, and writes where it is validated."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        sizes: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 64, "n_positions": 32}
        tokens: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
        config = GPT2Config(**sizes, **tokens, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        self.model = GPT2LMHeadModel(config)
        self.model.gradient_checkpointing_enable()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        written = self.model.generate(batch[0][:, :4], max_new_tokens=5, do_sample=False)
        self.log("written", written.float().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@each("zero3", "tp", refused=("pp",))  # which each token would have to pass in turn
def test_hugging_face_recomputes_and_generates_as_on_one_device(strategy: str) -> None:
    def loaders(to: str) -> Any:
        samples = torch.randint(2, 64, (16, 12), generator=torch.Generator().manual_seed(3))
        loader = dealt_out(DataLoader(TensorDataset(samples), batch_size=8), to)
        return loader, loader

    assert_trains_as_one_device(strategy, Writes, loaders)


class Data(pl.LightningDataModule):
    """Doubles what it loads."""

    def setup(self, stage: str) -> None:
        self.samples = small_loader().dataset

    def train_dataloader(self) -> Any:
        return DataLoader(self.samples, batch_size=8)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [2 * batch[0], batch[1]]


COMMAND_LINES = {
    "memopt_pp": ["--trainer.strategy=memopt_pp"],
    "with arguments": [
        "--trainer.strategy=lightning_memopt.PipelineParallelStrategy", "--trainer.strategy.microbatches=4",
        "--trainer.strategy.silent_seconds=20",
    ],
}  # fmt: skip


@pytest.mark.parametrize("strategy", COMMAND_LINES)
def test_the_command_line_of_lightning_trains_a_data_module_as_one_device(strategy: str) -> None:
    def fit(*arguments: str) -> list[np.ndarray]:
        from lightning.pytorch.cli import LightningCLI

        options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        options |= {"enable_model_summary": False, "callbacks": [RichProgressBar()]}
        args = ["fit", *arguments]
        ran = LightningCLI(Net, Data, args=args, save_config_callback=None, trainer_defaults=options)
        return [p.detach().numpy() for p in ran.model.parameters()]

    (plain,) = run_on_ranks(fit, 1, "--trainer.devices=1")
    for weights in run_on_ranks(fit, 2, "--trainer.devices=2", *COMMAND_LINES[strategy]):
        for ours, theirs in zip(weights, plain, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
