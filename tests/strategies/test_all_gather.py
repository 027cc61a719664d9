"""Steps that gather what other ranks computed (contrastive losses do) get each sample of the batch once."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import lightning_memopt as memopt
from lightning_memopt.parallel.mesh import MeshSizes
from tests.distributed import run_on_ranks
from tests.strategies.users import Net, small_loader, trainer_with

CASES: dict[str, tuple[MeshSizes, Callable[[], Any]]] = {
    "tp": (MeshSizes(tensor=2), memopt.TensorParallelStrategy),
    "pp": (MeshSizes(pipeline=2), lambda: memopt.PipelineParallelStrategy(microbatches=1)),
    "data x tensor": (MeshSizes(data=2, tensor=2), lambda: memopt.HybridStrategy(data=2, tensor=2)),
    "pipeline x data": (
        MeshSizes(pipeline=2, data=2),
        lambda: memopt.HybridStrategy(pipeline=2, data=2, microbatches=1),
    ),
}


class Contrasts(Net):
    """Compares each sample with all samples of the batch, those of other ranks too."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        own = F.normalize(self(batch[0]), dim=1)
        everyones = own
        if self.trainer.world_size > 1:
            assert not self.all_gather(own).requires_grad
            everyones = self.all_gather(own, sync_grads=True).flatten(0, 1)
        order = everyones.pow(3).sum(dim=1).argsort()  # not of the ranks, which have every other sample
        self.log("samples", float(len(everyones)))
        return (everyones[order] @ everyones[order].T * torch.arange(len(order))).exp().mean()


def _fit(sizes: MeshSizes, strategy: Any) -> tuple[float, dict[str, np.ndarray]]:
    dataset = small_loader(4).dataset
    sampler = DistributedSampler(dataset, sizes.batches, sizes.batch_of(int(os.environ["LOCAL_RANK"])), shuffle=False)
    trainer = trainer_with(strategy, devices=sizes.world)
    trainer.fit(module := Contrasts(), DataLoader(dataset, batch_size=8 // sizes.batches, sampler=sampler))
    weights = {name: weight.numpy() for name, weight in module.state_dict().items()}
    return float(trainer.callback_metrics["samples"]), weights


@pytest.mark.parametrize(
    "case", ["tp", "pp", "data x tensor", pytest.param("pipeline x data", marks=pytest.mark.slow)]
)
def test_what_a_step_gathers_has_each_sample_once_and_the_gradients_of_one_device(case: str) -> None:
    ((samples, plain),) = run_on_ranks(lambda: _fit(MeshSizes(), "auto"), 1)
    assert samples == 8
    sizes, make = CASES[case]
    for found, weights in run_on_ranks(lambda: _fit(sizes, make()), sizes.world):
        assert found == 8
        for name, weight in plain.items():
            np.testing.assert_allclose(weights[name], weight, rtol=1e-4, atol=1e-6, err_msg=name)
