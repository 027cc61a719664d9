"""Gradient accumulation beside the averaging of weights, which ends with an epoch without backward."""

import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch.nn import functional as F

from lightning_memopt import GradientAccumulation
from tests.callbacks.test_accumulation import TokenModel, loader, token_batches
from tests.parity import quiet_trainer


class BatchNormModel(TokenModel):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(10)

    def loss(self, batch):
        return F.cross_entropy(self.net(self.norm(batch["x"])).flatten(0, 1), batch["labels"].flatten())


@pytest.mark.parametrize("factor", [1, 2])
def test_the_batch_norm_epoch_of_weight_averaging_is_lightnings_own(factor):
    def fit(*callbacks, **options):
        module = BatchNormModel()
        averaging = StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=1)
        trainer = quiet_trainer(-1, *callbacks, averaging, max_epochs=3, **options)
        trainer.fit(module, loader(token_batches()[:4]))
        return module.state_dict(), trainer.global_step, trainer.accumulate_grad_batches

    expected, steps, _ = fit(accumulate_grad_batches=factor)
    state, ours, left = fit(GradientAccumulation(factor))
    assert ours == steps
    assert left == 1
    torch.testing.assert_close(state, expected)
