"""``Trainer(sync_batchnorm=True)`` on CPUs."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_memopt.parallel.batch_norm import synchronized_batch_norms
from tests.distributed import run_on_ranks
from tests.strategies.parity import CASES, assert_same_outcome, on_one_device, on_ranks
from tests.strategies.users import MAKE, Net, small_loader, trainer_with

QUICK = ("memopt_ddp", "memopt_zero3")
TOGETHER = [name for name, case in CASES.items() if case.sizes.pipeline == 1]


@pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TOGETHER]
)
def test_batches_are_normalized_over_all_ranks_as_on_one_device(strategy: str) -> None:
    for outcome in on_ranks("cnn", strategy, sync_batchnorm=True):
        assert_same_outcome(on_one_device("cnn"), outcome)


def test_ranks_with_unequally_many_samples_normalize_and_track_as_one_device() -> None:
    def normalize(sizes: tuple[int, ...]) -> list[np.ndarray]:
        rank = 0
        if len(sizes) > 1:
            dist.init_process_group("gloo")
            rank = dist.get_rank()
        torch.manual_seed(0)
        x = torch.randn(sum(sizes), 3, 4) * 2 + 100
        x = x.split(sizes)[rank].clone().requires_grad_()
        norm = nn.BatchNorm1d(3, momentum=None)
        with synchronized_batch_norms(norm, None) if len(sizes) > 1 else torch.enable_grad():
            for _ in range(2):
                output = norm(x)
                output.square().mul(torch.arange(4.0)).sum().backward()
        assert type(norm) is nn.BatchNorm1d
        kept: list[Any] = [output.detach(), x.grad, norm.running_mean, norm.running_var, norm.num_batches_tracked]
        return [tensor.numpy() for tensor in kept]

    (plain,) = run_on_ranks(lambda: normalize((8,)), 1)
    first, second = run_on_ranks(lambda: normalize((5, 3)), 2)
    for of_batch, *parts in list(zip(plain, first, second, strict=True))[:2]:
        np.testing.assert_allclose(np.concatenate(parts), of_batch, rtol=1e-4, atol=1e-4)
    for statistic, *same in list(zip(plain, first, second, strict=True))[2:]:
        for ours in same:
            np.testing.assert_allclose(ours, statistic, rtol=1e-5)


class HasBatchNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(32))


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "tp", "pp"])
def test_after_fit_batch_norms_have_the_classes_that_the_user_wrote(strategy: str) -> None:
    def fit() -> None:
        trainer = trainer_with(MAKE[strategy](), sync_batchnorm=True)
        for _ in range(2):
            trainer.fit(module := HasBatchNorm(), small_loader())
            assert type(module.net[1]) is nn.BatchNorm1d

    run_on_ranks(fit, 2)
