"""A pipeline trains the families of Hugging Face beside the zoo as one device does."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import lightning_memopt as memopt
from lightning_memopt.parallel.mesh import MeshSizes
from lightning_memopt.parallel.pipeline.torch_stage import CAN_SPLIT_BACKWARD
from tests.distributed import run_on_ranks
from tests.parity import quiet_trainer
from tests.strategies.parity import Outcome, fit_zoo
from tests.zoo import Entry
from tests.zoo.architectures import ARCHITECTURES, IN_SINGLE_PRECISION
from tests.zoo.text import LossInside

STEPS = 2


def _labels(batch: Any) -> Any:
    return (batch["labels"] != -100).sum()


def _next_labels(batch: Any) -> Any:
    return (batch["labels"][:, 1:] != -100).sum()


COUNTS: dict[str, Callable[[Any], Any]] = {
    "qwen2": _next_labels, "opt": _next_labels, "bloom": _next_labels, "roberta": _labels, "albert": _labels,
    "modernbert": _labels,
}  # fmt: skip
"""What the loss is a mean over, where samples have unequal shares in it."""


def _fit(entry: Entry, sizes: dict[str, int] | None = None, callbacks: Any = (), **options: Any) -> Outcome:
    name = entry.name
    fit: dict[str, Any] = {} if name in IN_SINGLE_PRECISION else {"precision": "64-true"}
    if sizes is None:
        return fit_zoo(entry, 1, STEPS, **fit)
    if name in COUNTS:
        options |= {"normalize": "tokens", "count": COUNTS[name]}
    if entry.has_batch_norm:
        options |= {"microbatches": 1}
    is_hybrid = len(sizes) > 1
    strategy = memopt.HybridStrategy(**sizes, **options) if is_hybrid else memopt.PipelineParallelStrategy(**options)
    mesh = MeshSizes(**sizes)
    return fit_zoo(entry, mesh.world, STEPS, sizes=mesh, strategy=strategy, extra=callbacks, **fit)


def _assert_same(entry: Entry, sizes: dict[str, int] | None = None, **options: Any) -> None:
    sizes = sizes or {"pipeline": 2}
    plain = run_on_ranks(lambda: _fit(entry), 1)[0]
    ranks = MeshSizes(**sizes).world
    for outcome in run_on_ranks(lambda: _fit(entry, sizes, **options), ranks, deadline_seconds=120):
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "other"),
    [("bart", "data"), ("mixtral", "shard"), ("wav2vec2", "shard"), ("deberta", "tensor"), ("segformer", "tensor")],
)
def test_a_pipeline_beside_another_kind_of_parallelism_trains_as_one_device(name, other):
    sizes = {"pipeline": 2, other: 2}
    _assert_same(ARCHITECTURES[name], sizes)


@pytest.mark.slow
def test_checkpointed_blocks_train_as_on_one_device():
    for name in ("albert", "segformer", "mobilenet_v2"):
        _assert_same(ARCHITECTURES[name], callbacks=[memopt.ActivationCheckpointing()])


class Predicts(LossInside):
    """Returns all that its model does."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        outputs = self.model(**batch).items()
        return {key: value for key, value in outputs if isinstance(value, torch.Tensor) and value.ndim > 1}


def _evaluate(name: str, ranks: int) -> list[Any]:
    entry = ARCHITECTURES[name]
    module = Predicts(entry.make(0.0).model)
    options: dict[str, Any] = {"precision": "64-true", "devices": ranks, "use_distributed_sampler": False}
    found = []
    for run in ("validate", "predict"):
        if ranks > 1:
            microbatches: Any = 1 if entry.has_batch_norm else "auto"
            options["strategy"] = memopt.PipelineParallelStrategy(microbatches=microbatches)
        found.append(getattr(quiet_trainer(1, **options), run)(module, entry.loader(2)))
    return tree_map(lambda leaf: leaf.numpy() if isinstance(leaf, torch.Tensor) else leaf, found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "bart", "resnet", "segformer", "wav2vec2"])
def test_what_validation_logs_and_steps_predict_is_that_of_one_device(name):
    def evaluate(ranks: int) -> list[Any]:
        torch.manual_seed(0)
        return _evaluate(name, ranks)

    plain = tree_leaves(run_on_ranks(lambda: evaluate(1), 1)[0])
    for found in run_on_ranks(lambda: evaluate(2), 2):
        for value, expected in zip(tree_leaves(found), plain, strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-9)
