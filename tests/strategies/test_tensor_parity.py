"""Tensor parallel ranks train as one device does, over the whole zoo."""

import numpy as np
import pytest

import lightning_memopt as memopt
from lightning_memopt.parallel.mesh import MeshSizes
from tests.distributed import run_on_ranks
from tests.strategies.parity import (
    ROUNDING_OF_DOUBLES,
    assert_same_outcome,
    fit_zoo,
    in_double_precision,
    on_one_device,
    on_ranks,
)
from tests.zoo import ZOO

QUICK = ("mlp", "gan")


def _each(quick: tuple[str, ...]) -> list[object]:
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in ZOO]


@pytest.mark.parametrize("name", _each(QUICK))
def test_two_ranks_train_as_one_device(name):
    for outcome in on_ranks(name, "memopt_tp"):
        assert_same_outcome(on_one_device(name), outcome)


@pytest.mark.parametrize("name", _each(()))
def test_two_ranks_train_as_one_device_in_double_precision(name):
    options = {"sizes": MeshSizes(tensor=2), "strategy": "memopt_tp", "precision": "64-true"}
    for outcome in run_on_ranks(lambda: fit_zoo(ZOO[name], 2, **options), 2, deadline_seconds=120):
        plain = in_double_precision(name)
        assert_same_outcome(plain, outcome, rtol=1e-8, atol=1e-8, rounding=ROUNDING_OF_DOUBLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_four_ranks_train_as_one_device_with_heads_that_divide_or_not(name):
    options = {"sizes": MeshSizes(tensor=4), "strategy": "memopt_tp"}
    for outcome in run_on_ranks(lambda: fit_zoo(ZOO[name], 4, **options), 4, deadline_seconds=120):
        assert_same_outcome(on_one_device(name), outcome)


def test_what_the_user_says_of_layers_trains_as_one_device():
    plan = {"net.0": "rowwise", "net.3": "colwise", "net.5": "whole"}

    def fit():
        strategy = memopt.TensorParallelStrategy(plan=plan)
        outcome = fit_zoo(ZOO["mlp"], 2, sizes=MeshSizes(tensor=2), strategy=strategy)
        return outcome, [line.split()[1] for line in strategy.describe().splitlines()[1:4]]

    for outcome, styles in run_on_ranks(fit, 2):
        assert_same_outcome(on_one_device("mlp"), outcome)
        assert styles == ["rowwise", "colwise", "whole"]


def test_ranks_drop_out_the_same_activations_and_end_with_the_same_weights():
    def fit():
        outcome = fit_zoo(ZOO["gpt2"], 2, 4, sizes=MeshSizes(tensor=2), strategy="memopt_tp", dropout=0.2)
        return outcome.losses, outcome.weights

    (losses, weights), (other_losses, other_weights) = run_on_ranks(fit, 2)
    np.testing.assert_array_equal(losses, other_losses)
    for name, weight in weights.items():
        np.testing.assert_array_equal(other_weights[name], weight, err_msg=name)
