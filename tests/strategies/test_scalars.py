"""Parameters without dimensions under the strategies: whole on every rank, and trained as on one device."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_memopt import HybridStrategy
from lightning_memopt.parallel.mesh import MeshSizes
from tests.distributed import run_on_ranks
from tests.strategies.parity import STRATEGIES, Probe, assert_same_outcome, fit_zoo
from tests.zoo import ZOO, Entry

SHARDED = [name for name in STRATEGIES if name != "memopt_ddp"]
MLP = ZOO["mlp"]


class Tempered(type(MLP.build())):  # type: ignore[misc]
    """Has a scalar that trains, as CLIP does, and one that does so later."""

    def __init__(self, dropout: float) -> None:
        super().__init__(dropout)
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.temperature.exp() / self.frozen

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.frozen.requires_grad_(self.global_step > 1)


@pytest.mark.parametrize("strategy", [*SHARDED, "memopt_tp", "memopt_hybrid"])
def test_scalars_stay_whole_and_train_as_on_one_device(strategy):
    entry = Entry("tempered", Tempered, MLP.sample)
    sizes = MeshSizes(tensor=2) if strategy == "memopt_tp" else MeshSizes(shard=2)
    given = HybridStrategy(shard=2) if strategy == "memopt_hybrid" else strategy

    def fit(ranks: int, **options: Any) -> Any:
        kinds = Probe("on_train_end", lambda module: type(module.temperature))
        return fit_zoo(entry, ranks, 4, extra=[kinds], **options), kinds.seen

    plain, _ = run_on_ranks(lambda: fit(1), 1)[0]
    assert plain.weights["temperature"] != 1.0 and plain.weights["frozen"] != 2.0
    for outcome, kinds in run_on_ranks(lambda: fit(2, strategy=given, sizes=sizes), 2):
        assert_same_outcome(plain, outcome)
        assert kinds == [nn.Parameter]
