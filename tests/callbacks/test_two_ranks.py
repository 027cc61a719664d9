"""Accumulation and micro-batching on two ranks: the numbers of one large batch, and no rank left waiting."""

import pytest
import torch

from tests.callbacks.on_two_ranks import LENGTHS, everything
from tests.callbacks.test_accumulation import by_hand, token_batches
from tests.distributed import run_on_ranks
from tests.parity import train
from tests.zoo import ZOO

pytestmark = pytest.mark.distributed

WINDOWS = [[4, 4, 2]]  # two ranks with windows of 2, 2 and 1


@pytest.fixture(scope="module")
def ranks():
    return run_on_ranks(everything, 2, deadline_seconds=120)


def assert_gradients_of_the_large_batches(gradients, clip=None):
    _, expected = by_hand(token_batches(LENGTHS), WINDOWS, clip=clip)
    expected = torch.stack(expected).flatten(1)
    torch.testing.assert_close(torch.tensor(gradients), expected, rtol=1e-4, atol=1e-6)


def test_tokens_weigh_the_same_on_whichever_rank_they_are(ranks):
    for result in ranks:
        assert_gradients_of_the_large_batches(result["token_weights"], clip=0.05)


def test_when_one_rank_runs_out_of_memory_all_repeat_the_batch_in_smaller_parts(ranks):
    for result in (rank["one_rank_runs_out_of_memory"] for rank in ranks):
        assert result["size"] == 1
        assert result["tries"] == [2, 2, 2, 1, 1, 1, 1, 1, 1]
        assert_gradients_of_the_large_batches(result["gradients"])


def test_when_nothing_fits_on_one_rank_all_end(ranks):
    first, second = (rank["nothing_fits_on_one_rank"] for rank in ranks)
    assert "another device" in first
    assert "micro-batches of a single sample" in second


def test_a_fixed_size_under_ddp_trains_as_one_device_with_both_ranks_batches(ranks):
    entry = ZOO["mlp"]
    batches = list(entry.loader(batches=6))
    merged = [tuple(map(torch.cat, zip(*batches[i : i + 2], strict=True))) for i in (0, 2, 4)]
    plain = train(entry.build(), torch.utils.data.DataLoader(merged, batch_size=None), steps=3)
    for rank in ranks:
        weights = torch.tensor(rank["fixed_size"])
        torch.testing.assert_close(weights, plain.weights["net.0.weight"].flatten())
