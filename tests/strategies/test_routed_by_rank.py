"""Modules of which ranks use different parts in one step, as experts are, train as on one device or are refused."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import lightning_memopt as memopt
from tests.distributed import run_on_ranks
from tests.strategies.users import MAKE, Net, losses_of, small_loader, trainer_with


class Block(nn.Module):
    """Has an expert for each half of the samples, and one for none, which weight decay would shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(16, 16)
        self.routes = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor, route: int) -> torch.Tensor:
        return x + self.routes[route](torch.relu(self.inlet(x)))


class Routes(Net):
    """Sends samples with even numbers to one expert, and those with odd numbers to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3))

    def run(self, x: torch.Tensor, route: int) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, route)
        return self.net(x + self.experts[route](x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.trainer.world_size == 2:
            return self.run(x, self.trainer.global_rank)
        return torch.stack([self.run(x[route::2], route) for route in range(2)], 1).flatten(0, 1)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def _fit(ranks: int, make: Callable[[], Any], **options: Any) -> dict[str, np.ndarray]:
    dataset = small_loader(6).dataset
    sampler = DistributedSampler(dataset, ranks, int(os.environ["RANK"]), shuffle=False)
    trainer = trainer_with(make(), devices=ranks, **options)
    trainer.fit(module := Routes(), DataLoader(dataset, batch_size=8 // ranks, sampler=sampler))
    return {name: weight.detach().numpy() for name, weight in module.state_dict().items()}


@pytest.mark.parametrize(
    ("strategy", "accumulate", "in_backward"),
    [("zero1", 1, False), ("zero2", 2, False), ("zero3", 2, False), ("zero3", 1, True)],
)
def test_experts_that_are_used_on_one_rank_or_none_train_as_on_one_device(
    strategy: str, accumulate: int, in_backward: bool
) -> None:
    def fit(ranks: int, make: Callable[[], Any]) -> dict[str, np.ndarray]:
        callbacks = [memopt.OptimizerInBackward()] if in_backward else []
        return _fit(ranks, make, callbacks=callbacks, accumulate_grad_batches=accumulate)

    plain = run_on_ranks(lambda: fit(1, lambda: "auto"), 1)[0]
    for weights in run_on_ranks(lambda: fit(2, MAKE[strategy]), 2, deadline_seconds=30):
        for name, weight in plain.items():
            np.testing.assert_allclose(weights[name], weight, rtol=1e-4, atol=1e-6, err_msg=name)


class DropsLayers(Net):
    """Calls the block of its rank's number, and all blocks are as large."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.blocks[self.trainer.global_rank](x))


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_ranks_that_call_different_blocks_are_stopped_before_the_optimizer_steps(strategy: str) -> None:
    def fit() -> None:
        with pytest.raises(MisconfigurationException, match="ranks called different blocks in one step"):
            losses_of(DropsLayers(), 2, MAKE[strategy]())

    run_on_ranks(fit, 2, deadline_seconds=30)
