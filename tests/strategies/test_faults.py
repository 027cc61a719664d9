"""A rank is killed, raises, hangs or is told to stop: the others end in time, and say which rank and why."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_memopt.strategies.data_parallel import DataParallelStrategy
from tests.ending import Ending, end_of_ranks

STRATEGIES: dict[str, Callable[..., Any]] = {
    "memopt_ddp": lambda **options: DataParallelStrategy("none", **options),
    "memopt_zero3": lambda **options: DataParallelStrategy("parameters", **options),
}
"""As a user gives them; one row each."""

FAULTY, BATCH = 1, 2
DEADLINE_SECONDS = 40


@dataclass
class Fault:
    """What happens to a rank, and where: the name of a hook, or of what its module computes."""

    place: str
    act: Callable[[], object]

    def strike(self, place: str, batch: int) -> None:
        if place == self.place and batch == BATCH:
            time.sleep(0.2)  # for the others to hear that it got here
            self.act()


class _StrikeInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, strike: Callable[[], None]) -> torch.Tensor:
        ctx.strike = strike
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.strike()
        return gradient, None


class _Optimizer(torch.optim.AdamW):
    strike: Callable[[], None]

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.strike()
        return loss


class Module(pl.LightningModule):
    def __init__(self, fault: Fault | None) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(4)))
        self.fault = fault
        self.batch = -1

    def strike(self, place: str) -> None:
        if self.fault is not None and self.global_rank == FAULTY:
            self.fault.strike(place, self.batch)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.batch = batch_idx
        hidden = self.layers[:2](batch[0])
        self.strike("forward")
        hidden = _StrikeInBackward.apply(hidden, lambda: self.strike("backward"))
        return self.layers[2:](hidden).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = _Optimizer(self.parameters(), lr=1e-3)
        optimizer.strike = lambda: self.strike("optimizer step")
        return optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.strike("checkpoint save")


def fit(strategy: Any, fault: Fault | None, folder: str, **options: Any) -> None:
    loader = DataLoader(TensorDataset(torch.randn(64, 16)), batch_size=4)
    pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        max_epochs=1,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=1, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    ).fit(Module(fault), loader)


def fit_with(name: str, fault: Fault, folder: Any, **watching: Any) -> list[Ending]:
    return end_of_ranks(lambda: fit(STRATEGIES[name](**watching), fault, str(folder)), 2, DEADLINE_SECONDS)


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def fail() -> None:
    raise ValueError("a bad sample")


PLACES = {
    "forward": "forward of batch 2",
    "backward": "backward of batch 2",
    "optimizer step": "optimizer step of batch 2",
    "checkpoint save": "",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_others_end_and_name_a_rank_that_was_killed(name: str, place: str, tmp_path: Any) -> None:
    other, _ = fit_with(name, Fault(place, send(signal.SIGKILL)), tmp_path)
    assert other.failed_with(f"Rank {FAULTY} ", PLACES[place], "its process ended without a word"), other


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_others_end_with_the_cause_of_a_rank_that_raised(name: str, tmp_path: Any) -> None:
    other, faulty = fit_with(name, Fault("forward", fail), tmp_path)
    assert other.failed_with(f"Rank {FAULTY} ", "forward of batch 2", "ValueError: a bad sample"), other
    assert faulty.failed_with("ValueError: a bad sample") and not faulty.failed_with("RankFailure"), faulty


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_others_end_and_name_a_rank_that_was_stopped(name: str, tmp_path: Any) -> None:
    other, _ = fit_with(name, Fault("forward", send(signal.SIGSTOP)), tmp_path, silent_seconds=2)
    assert other.failed_with(f"Rank {FAULTY} ", "forward of batch 2", "no sign of life"), other


@pytest.mark.parametrize("name", STRATEGIES)
def test_all_end_and_name_a_rank_that_the_others_wait_for(name: str, tmp_path: Any) -> None:
    fault = Fault("forward", lambda: time.sleep(1000))
    for ending in fit_with(name, fault, tmp_path, stuck_seconds=2):
        assert ending.failed_with(f"Rank {FAULTY} ", "forward of batch 2", "waited for it", "test_faults.py"), ending
