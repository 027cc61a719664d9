"""A pipeline trains as one device does on the same batches, whatever the schedule, or refuses by name."""

import functools
import os
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_memopt as memopt
from lightning_memopt.parallel.mesh import MeshSizes
from lightning_memopt.parallel.pipeline import operator_times
from tests.distributed import run_on_ranks
from tests.strategies.parity import Outcome, assert_same_outcome, can_split_backward, fit_zoo, on_one_device, on_ranks
from tests.zoo import ZOO

QUICK = ("mlp",)


def _matrix() -> list[object]:
    return [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name, entry in ZOO.items()
        if entry.automatic and not entry.has_batch_norm
    ]


@pytest.mark.parametrize("name", _matrix())
def test_two_stages_train_as_one_device(name):
    for outcome in on_ranks(name, "memopt_pp"):
        assert_same_outcome(on_one_device(name), outcome)


@functools.cache
def _short(name: str) -> Outcome:
    return run_on_ranks(lambda: fit_zoo(ZOO[name], 1, 4), 1)[0]


def _fit(name: str, ranks: int, steps: int = 4, strategy: dict[str, Any] | None = None, **options: Any) -> Outcome:
    made = memopt.PipelineParallelStrategy(**(strategy or {}))
    return fit_zoo(ZOO[name], ranks, steps, sizes=MeshSizes(pipeline=ranks), strategy=made, **options)


@pytest.mark.parametrize(
    ("name", "ranks", "options"),
    [
        ("gpt2", 2, {"schedule": "gpipe"}),
        ("gpt2", 2, {"microbatches": 3}),
        ("gpt2", 2, {"microbatches": 1}),
        ("gpt2", 2, {"split": ["model.transformer.h.1"]}),
        ("gpt2", 2, {"split": "measured"}),
        pytest.param("gpt2", 3, {}, marks=pytest.mark.slow),
        pytest.param("t5", 4, {}, marks=pytest.mark.slow),
        pytest.param("t5", 2, {"schedule": "interleaved_1f1b"}, marks=pytest.mark.slow),
        pytest.param("t5", 2, {"schedule": "zbv"}, marks=[pytest.mark.slow, can_split_backward]),
    ],
    ids=str,
)
def test_every_schedule_and_split_gives_the_numbers_of_one_device(name, ranks, options):
    plain = _short(name)
    for outcome in run_on_ranks(lambda: _fit(name, ranks, strategy=options), ranks):
        np.testing.assert_allclose(outcome.losses, plain.losses, rtol=1e-5)
        np.testing.assert_allclose(outcome.grad_norms, plain.grad_norms, rtol=1e-5)


def test_a_measured_split_is_what_the_first_rank_measured_on_every_rank(monkeypatch):
    class _SeenCut(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            self.starts = trainer.strategy.pipeline.partition.starts

    def cut() -> tuple[int, ...]:
        rank = int(os.environ["LOCAL_RANK"])

        def seconds(call: operator_times._Call, device: object) -> float:
            sizes = [leaf.shape for leaf in call.leaves if isinstance(leaf, operator_times._Like)]
            has_vocabulary = any(64 in shape and 32 in shape for shape in sizes)
            return 100.0 if has_vocabulary == (rank == 0) else 1.0  # the head is dear on rank 0, the blocks on rank 1

        monkeypatch.setattr(operator_times._Call, "try_on", seconds)
        _fit("gpt2", 2, 1, strategy={"split": "measured"}, extra=[seen := _SeenCut()])
        return seen.starts

    assert run_on_ranks(cut, 2) == [(0, 2), (0, 2)]


@pytest.mark.parametrize(
    ("name", "strategy", "fit", "said"),
    [
        ("gan", {}, {}, "`GAN` optimizes manually"),
        ("gpt2", {"schedule": "interleaved_1f1b"}, {}, "4 stages are asked for, and there are 3"),
        ("gpt2", {"microbatches": 9}, {}, "microbatches=9 is more than the 8 samples"),
        ("gpt2", {"split": ["model.lm_head"]}, {}, "'model.lm_head', which is no module to cut before"),
        ("gpt2", {"split": 3}, {}, "makes 3 stages, and 2 ranks"),
        ("gpt2", {}, {"extra": [memopt.MicroBatching(2)]}, "MicroBatching cannot work here"),
        ("gpt2", {}, {"extra": [memopt.OptimizerInBackward()]}, "OptimizerInBackward .* micro-batches"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_pipelined_is_refused_by_name_on_all_ranks(name, strategy, fit, said):
    def refuse() -> None:
        with pytest.raises(MisconfigurationException, match=said):
            _fit(name, 2, 1, strategy=strategy, **fit)

    run_on_ranks(refuse, 2)


@pytest.mark.parametrize(
    "argument",
    [{"schedule": "dualpipe"}, {"microbatches": 0}, {"split": []}, {"split": "timed"}, {"normalize": "x"}],
)
def test_a_bad_argument_is_refused_when_it_is_given(argument):
    with pytest.raises(MisconfigurationException, match=next(iter(argument))):
        memopt.PipelineParallelStrategy(**argument)


def test_zero_bubbles_are_refused_by_name_under_a_torch_that_cannot_split_backwards(monkeypatch):
    monkeypatch.setattr("lightning_memopt.parallel.pipeline.torch_stage.CAN_SPLIT_BACKWARD", False)
    with pytest.raises(MisconfigurationException, match=r"HybridStrategy\(schedule='zbv'\) .* install torch 2.13"):
        memopt.HybridStrategy(pipeline=2, schedule="zbv")
