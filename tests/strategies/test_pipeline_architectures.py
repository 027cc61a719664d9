"""A pipeline trains the families of Hugging Face beside the zoo as one device does."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import lightning_memopt as memopt
from lightning_memopt.parallel.mesh import MeshSizes
from lightning_memopt.parallel.pipeline.torch_stage import CAN_SPLIT_BACKWARD
from tests.distributed import run_on_ranks
from tests.strategies.parity import Outcome, fit_zoo
from tests.zoo import Entry
from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.text import LossInside

STEPS = 2
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


def _fit(entry: Entry, ranks: int, **options: Any) -> Outcome:
    name = entry.name
    fit: dict[str, Any] = {} if name in IN_SINGLE else {"precision": "64-true"}
    if ranks > 1:
        if name in COUNTS:
            options |= {"normalize": "tokens", "count": COUNTS[name]}
        if entry.has_batch_norm:
            options |= {"microbatches": 1}
        fit |= {"sizes": MeshSizes(pipeline=ranks), "strategy": memopt.PipelineParallelStrategy(**options)}
    return fit_zoo(entry, ranks, STEPS, **fit)


def _assert_same(entry: Entry, **options: Any) -> None:
    plain = run_on_ranks(lambda: _fit(entry, 1), 1)[0]
    for outcome in run_on_ranks(lambda: _fit(entry, 2, **options), 2):
        np.testing.assert_allclose(outcome.losses, plain.losses, rtol=1e-5)
        np.testing.assert_allclose(outcome.grad_norms, plain.grad_norms, rtol=1e-5)
        for weight, expected in plain.weights.items():
            np.testing.assert_allclose(outcome.weights[weight], expected, rtol=1e-4, atol=1e-6, err_msg=weight)


def _slow_but(quick: Any, cases: Iterable[Any]) -> list[Any]:
    return [pytest.param(*case, marks=[] if case in quick else [pytest.mark.slow]) for case in cases]


@pytest.mark.parametrize("name", _slow_but([("mixtral",)], zip(ARCHITECTURES, strict=True)))
def test_two_stages_train_each_family_as_one_device(name):
    _assert_same(ARCHITECTURES[name])


WITH_FOUR_STAGES = ("bart", "whisper", "clip", "swin", "resnet", "segformer", "mobilenet_v2")
"""A stage of these is sent what passes blocks by, or writes buffers that another of its rank has on its way."""


@pytest.mark.parametrize(
    ("name", "schedule"),
    _slow_but(
        [("resnet", "interleaved_1f1b"), ("segformer", "zbv")],
        itertools.product(WITH_FOUR_STAGES, ("interleaved_1f1b", "zbv")),
    ),
)
def test_two_stages_on_a_rank_train_as_one_device(name, schedule):
    if schedule == "zbv" and not CAN_SPLIT_BACKWARD:
        pytest.skip("the torch that is installed cannot split backwards")
    _assert_same(ARCHITECTURES[name], schedule=schedule)


class ReadsEveryBlock(LossInside):
    """Has a loss of what each block returns, or each router of a mixture of experts."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        what = "router_logits" if "moe" in self.model.config.model_type else "hidden_states"
        outputs = self.model(**batch, **{f"output_{what}": True})
        return outputs.loss + sum((values.double() ** 2).mean() for values in outputs[what])


@pytest.mark.parametrize(
    "name", _slow_but([("qwen3_moe",)], zip(["qwen3_moe", "mistral", "roberta", "swin", "wav2vec2"], strict=True))
)
def test_what_every_block_returns_may_be_in_the_loss(name):
    entry = ARCHITECTURES[name]
    reads = replace(entry, make=lambda dropout: ReadsEveryBlock(entry.make(dropout).model))
    _assert_same(reads, microbatches=1)  # the loss that balances experts is that of a whole batch
