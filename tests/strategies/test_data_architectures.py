"""Replicas and shards of families of Hugging Face train as one device does, or as torch's own replicas do."""

from dataclasses import replace

import pytest

from tests.distributed import run_on_ranks
from tests.strategies.parity import (
    ROUNDING_OF_DOUBLES,
    Outcome,
    assert_same_outcome,
    fit_zoo,
    in_double_precision,
    on_one_device,
    on_ranks,
)
from tests.zoo.architectures import ARCHITECTURES, IN_SINGLE_PRECISION

STEPS = 3
STRATEGIES = ("memopt_ddp", "memopt_zero1", "memopt_zero3")
QUICK = (("clip", "memopt_zero3"),)
MASKED = ("qwen2", "opt", "bloom", "roberta", "albert", "modernbert")
"""Their loss is a mean over the tokens of a rank's share, and shares have more or fewer."""


def _each() -> list[object]:
    return [
        pytest.param(name, strategy, marks=[] if (name, strategy) in QUICK else [pytest.mark.slow])
        for name in ARCHITECTURES
        for strategy in STRATEGIES
    ]


@pytest.mark.parametrize(("name", "strategy"), _each())
def test_two_ranks_train_as_one_device_or_as_torchs_own_replicas(name, strategy):
    if name in IN_SINGLE_PRECISION:
        for outcome in on_ranks(name, strategy, STEPS):
            assert_same_outcome(on_one_device(name, STEPS), outcome)
        return
    expected = in_double_precision(name, STEPS)
    outcomes = on_ranks(name, strategy, STEPS, precision="64-true")
    if name in MASKED or ARCHITECTURES[name].has_batch_norm:
        expected = replace(_of_stock_replicas(name), amplified=expected.amplified)
        outcomes = tuple(map(_without_statistics, outcomes))
    for outcome in outcomes:
        # Losses are recorded as float32, of which the ranks' mean rounds.
        assert_same_outcome(expected, outcome, rtol=1e-6, atol=1e-7, rounding=ROUNDING_OF_DOUBLES)


def _of_stock_replicas(name: str) -> Outcome:
    options = {"strategy": "ddp_find_unused_parameters_true", "precision": "64-true"}
    return _without_statistics(run_on_ranks(lambda: fit_zoo(ARCHITECTURES[name], 2, STEPS, **options), 2)[0])


def _without_statistics(outcome: Outcome) -> Outcome:
    """Those of BatchNorm are rank 0's under torch's replicas, and each rank's own under shards."""
    is_statistic = ("running_mean", "running_var", "num_batches_tracked")
    weights = {name: weight for name, weight in outcome.weights.items() if not name.endswith(is_statistic)}
    return replace(outcome, weights=weights)
