"""Steps that leave blocks out, each time others (stochastic depth, schedules of layers)."""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F

import lightning_memopt as memopt
from tests.distributed import run_on_ranks
from tests.ending import end_of_ranks
from tests.strategies.users import losses_of, small_loader, trainer_with


class Skips(pl.LightningModule):
    """``skipped`` says by batch which blocks are left out; ``None``: by chance."""

    def __init__(self, skipped: tuple[tuple[int, ...], ...] | None, share: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inlet = nn.Linear(16, 32)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 2, 32, dropout=0.0, batch_first=True) for _ in range(8)
        )
        self.outlet = nn.Linear(32, 4)
        self.skipped = skipped
        self.share = share

    def forward(self, x: torch.Tensor, skipped: tuple[int, ...] = ()) -> torch.Tensor:
        hidden = self.inlet(x)[:, None]
        for number, block in enumerate(self.blocks):
            by_chance = self.training and torch.rand([]) < self.share
            if number not in skipped and not by_chance:
                hidden = block(hidden)
        return self.outlet(hidden[:, 0])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        skipped = () if self.skipped is None else self.skipped[batch_idx % len(self.skipped)]
        return F.cross_entropy(self(batch[0], skipped), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("interleaved_1f1b", marks=pytest.mark.slow)])
def test_a_step_that_skips_blocks_trains_as_on_one_device(schedule: Any) -> None:
    skipped = (), (1,), (3, 4), (0, 2, 4, 6)  # the first of a stage among them

    (plain,) = run_on_ranks(lambda: losses_of(Skips(skipped)), 1)
    for losses in run_on_ranks(
        lambda: losses_of(Skips(skipped), 2, memopt.PipelineParallelStrategy(schedule, microbatches=2)), 2
    ):
        np.testing.assert_allclose(losses, plain, rtol=1e-5)


def test_stages_skip_blocks_by_chance_and_all_ranks_see_one_loss() -> None:
    first, second = run_on_ranks(
        lambda: losses_of(Skips(None, 0.1), 2, memopt.PipelineParallelStrategy(microbatches=2)), 2
    )
    assert first == second and np.isfinite(first).all()


def test_all_ranks_end_where_a_step_skips_all_blocks_of_a_stage_and_say_what_to_do() -> None:
    def fit() -> None:
        strategy = memopt.PipelineParallelStrategy(microbatches=2)
        strategy._watch.grace_seconds = 2  # in place of 10, to test faster
        trainer_with(strategy).fit(Skips(((), (4, 5, 6, 7))), small_loader())

    for ending in end_of_ranks(fit, 2, deadline_seconds=40):
        assert ending.failed_with("which a stage begins with, or a block behind that; a pipeline needs"), ending


class ValidatesWithoutBlocks(Skips):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("mean", self.outlet(self.inlet(batch[0])).mean())


def test_validation_that_calls_no_block_is_refused_on_all_ranks_with_the_reason() -> None:
    def fit() -> None:
        with pytest.raises(MisconfigurationException, match="each step has to pass through all of them"):
            trainer_with(memopt.PipelineParallelStrategy(microbatches=2)).fit(
                ValidatesWithoutBlocks(None), small_loader(), small_loader()
            )

    run_on_ranks(fit, 2, deadline_seconds=30)
