"""Accumulated batches that weigh by what they count, and what counts as a device, under every strategy."""

from typing import Any

import numpy as np
import pytest

import lightning_memopt as memopt
from tests.distributed import run_on_ranks
from tests.strategies.parity import CASES, GLOBAL_BATCH, fit_zoo
from tests.strategies.users import MAKE, Net, small_loader, trainer_with
from tests.zoo import ZOO

slow = pytest.mark.slow


def _norms(ranks: int, **options: Any) -> np.ndarray:
    # Of gradients, since AdamW makes the same steps of any multiple of them.
    accumulation = memopt.GradientAccumulation(4, normalize="samples")  # the last window of an epoch has two batches
    return fit_zoo(ZOO["mlp"], ranks, 3, extra=[accumulation], accumulate_grad_batches=1, **options).grad_norms


@pytest.mark.parametrize(
    "name",
    [
        "memopt_zero3",
        "memopt_tp",
        "memopt_pp",
        pytest.param("memopt_zero1", marks=slow),
        pytest.param("memopt_zero2", marks=slow),
        pytest.param("hybrid: data x shard", marks=slow),
        pytest.param("hybrid: shard x tensor", marks=slow),
        pytest.param("hybrid: pipeline x data", marks=slow),
    ],
)
def test_batches_that_weigh_by_samples_and_a_short_last_window_have_the_gradients_of_one_device(name: str) -> None:
    case = CASES[name]
    (plain,) = run_on_ranks(lambda: _norms(1), 1)
    for norms in run_on_ranks(
        lambda: _norms(case.sizes.world, sizes=case.sizes, strategy=case.make()), case.sizes.world
    ):
        np.testing.assert_allclose(norms, plain, rtol=1e-5)


@pytest.mark.parametrize(("name", "factor"), [("zero1", 2), pytest.param("pp", 4, marks=slow)])
def test_a_target_batch_size_counts_the_ranks_that_have_batches_of_their_own(name: str, factor: int) -> None:
    def fit() -> int:
        accumulation = memopt.GradientAccumulation(target_batch_size=4 * GLOBAL_BATCH)
        trainer = trainer_with(MAKE[name](), callbacks=[accumulation])
        trainer.fit(Net(), small_loader(4))
        return trainer.global_step

    assert run_on_ranks(fit, 2) == [4 // factor] * 2
