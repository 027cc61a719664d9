"""What one rank of many is predicted to hold is what a rank holds."""

from collections.abc import Callable
from itertools import takewhile

import pytest
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging

import lightning_memopt as memopt
from lightning_memopt.parallel.mesh import MeshSizes
from lightning_memopt.planning.predict import predict_step
from lightning_memopt.planning.ranks import one_of_many
from lightning_memopt.planning.space import Layout
from tests.distributed import run_on_ranks
from tests.strategies.parity import assert_same_outcome, on_one_device, on_ranks
from tests.zoo import ZOO

LAYOUTS = {
    "memopt_ddp": MeshSizes(data=2),
    "memopt_zero1": MeshSizes(shard=2),
    "memopt_zero2": MeshSizes(shard=2),
    "memopt_zero3": MeshSizes(shard=2),
    "memopt_tp": MeshSizes(tensor=2),
    "memopt_zero3_offload": MeshSizes(shard=2),
}


def _measured(name: str, strategy: str, *callbacks: Callback) -> int:
    """Bytes at the peak of this rank."""
    entry = ZOO[name]
    return memopt.measure_memory(
        entry.build(), entry.batch(), strategy=strategy, devices=2, callbacks=list(callbacks)
    ).peak_bytes


def _assert_predicted(name: str, strategy: str, *make_callbacks: Callable[[], Callback]) -> None:
    entry = ZOO[name]
    with one_of_many(Layout(strategy, LAYOUTS[strategy])) as rank_strategy:
        predicted = predict_step(
            entry.build(), entry.batch(), callbacks=[make() for make in make_callbacks], rank_strategy=rank_strategy
        ).peak_bytes
    # Tensors that threads of gloo drop last, which is a matter of chance, are not seen to be released.
    measured = (run_on_ranks(_measured, 2, name, strategy, *(make() for make in make_callbacks))[0] for _ in range(3))
    wrong = list(takewhile(lambda peak: predicted != pytest.approx(peak, rel=0.02, abs=33 * 2**10), measured))
    assert len(wrong) < 3, (predicted, wrong)


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["memopt_zero3", pytest.param("memopt_tp", marks=pytest.mark.slow)])
def test_the_state_in_few_bits_of_a_rank_is_predicted(strategy):
    _assert_predicted("bert_qa", strategy, lambda: memopt.LowBitOptimizer(8))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "strategy",
    [
        "memopt_zero3",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("memopt_zero1", "memopt_zero2", "memopt_tp")),
    ],
)
def test_gradients_that_a_rank_frees_in_the_backward_are_predicted(strategy):
    _assert_predicted("bert_qa", strategy, memopt.OptimizerInBackward)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["memopt_zero1", "memopt_zero3", "memopt_tp"])
def test_the_average_that_a_rank_holds_is_predicted(strategy):
    _assert_predicted("bert_qa", strategy, EMAWeightAveraging)


PIPELINED = ("gpt2", "encoder", "llama", "t5", "bert_qa", "vit")
QUICK = ("memopt_ddp", "memopt_zero3", "memopt_tp")


def _pairs() -> list[object]:
    return [
        pytest.param(name, strategy, marks=() if name == "gpt2" and strategy in QUICK else pytest.mark.slow)
        for name in ("gpt2", "llama", "t5", "bert_qa", "vit")
        for strategy in LAYOUTS
    ]


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "strategy"), _pairs())
def test_a_rank_of_any_transformer_holds_what_was_predicted(name, strategy):
    # Of large modules: what collectives hold for a moment in threads of their own is kilobytes, and not always there.
    _assert_predicted(name, strategy)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in PIPELINED)])
def test_a_stage_holds_what_was_predicted(name):
    entry = ZOO[name]
    predicted = []
    for stage in range(2):
        with one_of_many(Layout("memopt_pp", MeshSizes(pipeline=2)), stage) as strategy:
            predicted.append(predict_step(entry.build(), entry.batch(), rank_strategy=strategy).peak_bytes)
    # Of a module of kilobytes one tensor that is still being sent, which is a matter of chance, is 4 %.
    measured = (run_on_ranks(_measured, 2, name, "memopt_pp") for _ in range(3))
    wrong = list(takewhile(lambda peaks: predicted != pytest.approx(peaks, rel=0.02), measured))
    assert len(wrong) < 3, (predicted, wrong)


def test_more_ranks_hold_less_each_and_no_rank_holds_whole_parameters_beside_its_shards():
    entry = ZOO["mlp"]
    whole = memopt.predict_memory(entry.build(), entry.batch()).by_category["parameters"]
    peaks = []
    for ranks in (2, 8):
        with one_of_many(Layout("memopt_zero3", MeshSizes(shard=ranks))) as strategy:
            report = predict_step(entry.build(), entry.batch(), rank_strategy=strategy)
        peaks.append(report.by_category["optimizer_state"])
        assert report.timeline[0].by_category["other"] < whole / 2
    assert peaks[1] < peaks[0] / 3


@pytest.mark.slow
@pytest.mark.distributed
def test_a_prediction_leaves_nothing_behind_that_real_ranks_meet():
    entry = ZOO["gpt2"]
    with one_of_many(Layout("memopt_tp", MeshSizes(tensor=2))) as strategy:
        predict_step(entry.build(), entry.batch(), rank_strategy=strategy)
    for outcome in on_ranks("gpt2", "memopt_tp"):
        assert_same_outcome(on_one_device("gpt2"), outcome)


def test_of_offloaded_shards_a_gpu_holds_neither_state_nor_gradients():
    from lightning_memopt.planning.devices import device_model
    from lightning_memopt.planning.memory_model import host_bytes, rank_peak
    from lightning_memopt.planning.space import Choice, Techniques
    from lightning_memopt.planning.trace import StepTracer

    module, batch = ZOO["encoder"].build(), ZOO["encoder"].batch()
    tracer = StepTracer(module, module, batch, {})
    sizes = MeshSizes(shard=2)
    stays, offloaded = (
        Choice(Layout(strategy, sizes), Techniques()) for strategy in ("memopt_zero3", "memopt_zero3_offload")
    )
    on_gpu = [rank_peak(tracer.trace(choice), choice.layout, device_model("h100")) for choice in (stays, offloaded)]
    assert on_gpu[1]["parameters"] == on_gpu[1]["optimizer_state"] == on_gpu[1]["gradients"] == 0
    assert sum(on_gpu[1].values()) < sum(on_gpu[0].values())
    shards = on_gpu[0]["parameters"] + on_gpu[0]["optimizer_state"]
    assert host_bytes(tracer.trace(offloaded)) >= shards > 0
