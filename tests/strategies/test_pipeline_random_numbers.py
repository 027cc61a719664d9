"""What steps draw at random is the same on all stages where they must agree, and no stage's dropout is another's."""

import os
import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_memopt as memopt
from tests.distributed import run_on_ranks
from tests.strategies.parity import can_split_backward
from tests.strategies.users import Checkpoints, Net, losses_of, small_loader, trainer_with


class Denoiser(Net):
    """Is trained to tell the noise that the step adds."""

    def __init__(self) -> None:
        super().__init__()
        self.outlet = nn.Linear(4, 16)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        noise = torch.randn_like(batch[0])
        return F.mse_loss(self.outlet(self.net(batch[0] + noise)), noise)


def test_a_step_that_adds_noise_trains_as_on_one_device() -> None:
    (plain,) = run_on_ranks(lambda: losses_of(Denoiser()), 1)
    for losses in run_on_ranks(lambda: losses_of(Denoiser(), 2, memopt.PipelineParallelStrategy(microbatches=1)), 2):
        np.testing.assert_allclose(losses[:BATCHES], plain[:BATCHES], rtol=1e-5)


class PassesOn(nn.Module):
    """Gives what it gets, and draws random numbers on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.dropout(self.linear(x), 0.5, self.training)


class Compares(Net):
    """Its loss is zero where what goes into the first block is what the last stage takes it for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(PassesOn() for _ in range(8)))
        self.noises: set[float] = set()

    def both(self, batch: Any) -> torch.Tensor:
        noise = torch.randn_like(batch[0]) * random.random() + np.random.rand()
        self.noises.add(float(noise.sum()))
        return F.mse_loss(self.net(F.dropout(noise, 0.0)), noise)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.both(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.both(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


BATCHES = 4
"""Of an epoch; between two of them the loader draws, on one device from the same numbers."""
MICRO_BATCHES = 4


class Sees(pl.Callback):
    """Keeps losses."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", pytest.param("zbv", marks=can_split_backward)])
def test_all_stages_draw_the_same_in_front_of_their_blocks_and_other_numbers_each_time(schedule: Any) -> None:
    def fit() -> tuple[list[float], float, int]:
        random.seed(torch.initial_seed() + int(os.environ["RANK"]))  # as without a seed
        strategy = memopt.PipelineParallelStrategy(schedule, microbatches=MICRO_BATCHES)
        seen: list[float] = []
        trainer = trainer_with(strategy, callbacks=[Sees(seen)], num_sanity_val_steps=0)
        trainer.fit(module := Compares(), small_loader(4), small_loader(2))
        return seen, float(trainer.callback_metrics["loss"]), len(module.noises)

    for losses, validated, different in run_on_ranks(fit, 2):
        assert losses == [0.0] * 4
        assert validated == 0.0
        assert different >= (4 + 2) * MICRO_BATCHES


class DropsOut(Checkpoints):
    """Recomputes blocks that drop out, or does not."""

    def __init__(self, recomputes: bool) -> None:
        super().__init__(together=3)  # a stage begins within a run that is recomputed
        self.recomputes = recomputes
        for part in self.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.3

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.recomputes:
            return super().training_step(batch, batch_idx)
        hidden = self.inlet(batch[0])[:, None]
        for first in range(0, len(self.blocks), self.together):
            hidden = self.run_blocks(first, hidden)
        return F.cross_entropy(self.outlet(hidden[:, 0]), batch[1])


def test_what_is_recomputed_drops_out_as_it_did() -> None:
    def fit(recomputes: bool) -> list[float]:
        return losses_of(DropsOut(recomputes), 2, memopt.PipelineParallelStrategy(microbatches=2))

    for kept, recomputed in zip(run_on_ranks(fit, 2, False), run_on_ranks(fit, 2, True), strict=True):
        np.testing.assert_allclose(recomputed, kept, rtol=1e-5)
