"""A pipeline trains the families of Hugging Face beside the zoo as one device does."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import lightning_memopt as memopt
from lightning_memopt.parallel.mesh import MeshSizes
from tests.distributed import run_on_ranks
from tests.strategies.parity import Outcome, fit_zoo
from tests.zoo.architectures import ARCHITECTURES

STEPS = 2
QUICK = ("mixtral", "segformer")
IN_SINGLE = ("mixtral", "qwen3_moe")
"""torch has no grouped products of doubles."""


def _labels(batch: Any) -> Any:
    return (batch["labels"] != -100).sum()


def _next_labels(batch: Any) -> Any:
    return (batch["labels"][:, 1:] != -100).sum()


COUNTS: dict[str, Callable[[Any], Any]] = {
    "qwen2": _next_labels, "opt": _next_labels, "bloom": _next_labels, "roberta": _labels, "albert": _labels,
    "modernbert": _labels,
}  # fmt: skip
"""What the loss is a mean over, where samples have unequal shares in it."""


def _fit(name: str, ranks: int, **options: Any) -> Outcome:
    entry = ARCHITECTURES[name]
    fit: dict[str, Any] = {} if name in IN_SINGLE else {"precision": "64-true"}
    if ranks > 1:
        if name in COUNTS:
            options |= {"normalize": "tokens", "count": COUNTS[name]}
        if entry.has_batch_norm:
            options |= {"microbatches": 1}
        fit |= {"sizes": MeshSizes(pipeline=ranks), "strategy": memopt.PipelineParallelStrategy(**options)}
    return fit_zoo(entry, ranks, STEPS, **fit)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in ARCHITECTURES]
)
def test_two_stages_train_each_family_as_one_device(name):
    plain = run_on_ranks(lambda: _fit(name, 1), 1)[0]
    for outcome in run_on_ranks(lambda: _fit(name, 2), 2):
        np.testing.assert_allclose(outcome.losses, plain.losses, rtol=1e-5)
        np.testing.assert_allclose(outcome.grad_norms, plain.grad_norms, rtol=1e-5)
        for weight, expected in plain.weights.items():
            np.testing.assert_allclose(outcome.weights[weight], expected, rtol=1e-4, atol=1e-6, err_msg=weight)
