"""Replicas and every ZeRO stage train as one device does on the same global batches."""

import numpy as np
import pytest
import torch

from lightning_memopt import measure_memory
from tests.distributed import run_on_ranks
from tests.parity import train
from tests.strategies.parity import STRATEGIES, assert_same_outcome, on_one_device, on_ranks
from tests.zoo import ZOO

QUICK = [*((name, strategy) for name in ("mlp", "gan") for strategy in STRATEGIES), ("gpt2", "memopt_zero3")]


def _matrix() -> list[object]:
    """All of them, of which a few at each change."""
    return [
        pytest.param(name, strategy, marks=[] if (name, strategy) in QUICK else [pytest.mark.slow])
        for name, entry in ZOO.items()
        for strategy in STRATEGIES
        if not entry.has_batch_norm
    ]


@pytest.mark.parametrize(("name", "strategy"), _matrix())
def test_two_ranks_train_as_one_device(name, strategy):
    for outcome in on_ranks(name, strategy):
        assert_same_outcome(on_one_device(name), outcome)


@pytest.mark.parametrize("strategy", ["memopt_ddp", "memopt_zero3"])
def test_both_ranks_end_with_the_same_weights_where_batch_norm_sees_only_a_share(strategy):
    first, second = on_ranks("cnn", strategy)
    for name, weight in first.weights.items():
        if "running" not in name:
            np.testing.assert_array_equal(second.weights[name], weight, err_msg=name)


@pytest.mark.parametrize("name", ["gpt2", "gan"])
def test_one_rank_alone_trains_and_holds_what_one_device_does(name: str) -> None:
    def train_alone() -> tuple[dict[str, torch.Tensor], int]:
        entry = ZOO[name]
        weights = train(entry.build(), entry.loader(4), steps=4, strategy="memopt_ddp").weights
        return weights, measure_memory(entry.build(), entry.batch(), strategy="memopt_ddp").peak_bytes

    entry = ZOO[name]
    plain = train(entry.build(), entry.loader(4), steps=4).weights
    ((weights, peak),) = run_on_ranks(train_alone, 1)
    torch.testing.assert_close(weights, plain, rtol=0, atol=0)
    assert peak == pytest.approx(measure_memory(entry.build(), entry.batch()).peak_bytes, rel=0.01)
