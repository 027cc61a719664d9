"""A pipeline is planned from few of its stages and micro-batches, and these say what all of them do."""

import dataclasses

import lightning.pytorch as pl
import pytest
import torch

import lightning_memopt as memopt
from lightning_memopt.demo.model import GPT
from lightning_memopt.parallel.mesh import MeshSizes
from lightning_memopt.parallel.pipeline.splitting import Partition
from lightning_memopt.parallel.pipeline.timing import pipeline_idle
from lightning_memopt.planning import trace as tracing
from lightning_memopt.planning.operators import Collective, OperatorCall
from lightning_memopt.planning.plan import PlanResult
from lightning_memopt.planning.read_module import most_stages
from lightning_memopt.planning.space import Choice, Layout, Techniques, find_layouts
from lightning_memopt.planning.stages import Stages, stages_to_trace
from lightning_memopt.planning.time_model import seconds_per_batch
from lightning_memopt.planning.trace import StepTrace, StepTracer
from tests.distributed import run_on_ranks
from tests.planning.a_cpu import A_CPU
from tests.zoo import ZOO

_TWO = Layout("memopt_pp", MeshSizes(pipeline=2))
_FOUR = Choice(Layout("memopt_pp", MeshSizes(pipeline=4)), Techniques())


def _tracer(name: str) -> StepTracer:
    module, batch = ZOO[name].build(), ZOO[name].batch()
    return StepTracer(module, module, batch, {})


@pytest.mark.parametrize("name", ["mlp", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_one_more_micro_batch_than_stages_peak_where_all_do(name, monkeypatch):
    def peaks() -> list[int]:
        traces = _tracer(name).trace(Choice(_TWO, Techniques())).stages.traces
        return [traces[stage].peak.total_bytes for stage in (0, 1)]

    few = peaks()
    monkeypatch.setattr(tracing, "few_micro_batches", lambda batch, stages: (batch, 8))
    assert few == pytest.approx(peaks(), rel=0.005)


def test_stages_between_are_traced_where_they_may_hold_the_most():
    def traced(*starts: int, links: int) -> list[int]:
        names = tuple(f"blocks.{number}" for number in range(links))
        return stages_to_trace(Partition(names, starts, costs=(1.0,) * len(starts)))

    assert traced(0, 2, 4, 6, links=8) == [0, 3]
    assert traced(0, 2, 5, 8, links=10) == [0, 1, 3]
    assert traced(0, 4, 7, 12, links=14) == [0, 2, 3]


def _stages(*forwards: float, send_bytes: int = 0) -> StepTrace:
    """A pipeline of which all stages were traced: of each the seconds of its forwards on the device of these tests."""
    traces = {
        stage: StepTrace(
            (),
            tuple(OperatorCall(part, "aten.mm", "float32", 0, int(bytes_ * 1e10), 1) for part, bytes_ in parts),
            (Collective("send", send_bytes, (0, 1, 2, 3), False, 16.0),) * bool(send_bytes),
        )
        for stage, parts in enumerate((("forward", each), ("backward", 2 * each)) for each in forwards)
    }
    return dataclasses.replace(traces[0], stages=Stages(traces, forwards, microbatches=16))


def _parts(trace: StepTrace) -> dict[str, float]:
    device = dataclasses.replace(A_CPU, kind="cuda", operator_overhead=0.0)
    return seconds_per_batch(trace, _FOUR, device, devices=4)


def test_equal_stages_wait_as_the_schedule_has_it():
    parts = _parts(_stages(1.0, 1.0, 1.0, 1.0))
    assert parts["compute"] == pytest.approx(3.0)
    assert parts["idle"] / sum(parts.values()) == pytest.approx(pipeline_idle("1f1b", 4, 16))
    assert parts["idle"] == pytest.approx(3.0 * 3 / 16)


def test_stages_wait_for_a_slower_one_and_for_what_they_are_sent():
    equal, uneven = _parts(_stages(1.0, 1.0, 1.0, 1.0)), _parts(_stages(1.0, 1.0, 2.0, 1.0))
    assert uneven["compute"] == pytest.approx(3.75)
    assert sum(uneven.values()) > 6.0 > sum(equal.values())
    sending = _parts(_stages(1.0, 1.0, 1.0, 1.0, send_bytes=10**8))
    assert sending["communication"] > 6 * 0.1  # at least from the first to the last and back
    assert sending["idle"] == pytest.approx(equal["idle"])


def test_pipelines_are_in_the_space_as_far_as_module_and_batch_can_be_cut():
    module, batch = ZOO["gpt2"].build(), ZOO["gpt2"].batch()
    assert most_stages(module, batch) == 3
    assert most_stages(ZOO["cnn"].build(), ZOO["cnn"].batch()) == 1  # its statistics would be of micro-batches
    within = {
        layout.sizes for layout in find_layouts(8, 1, has_host=True, most_stages=3) if layout.sizes.pipeline > 1
    }
    assert within == {MeshSizes(pipeline=2, shard=4)}
    across = {layout.sizes for layout in find_layouts(8, 2, has_host=True, most_stages=3)}
    assert MeshSizes(pipeline=2, tensor=8) in across
    assert not any(layout.sizes.pipeline > 1 for layout in find_layouts(8, 2, has_host=True))


@pytest.fixture(scope="module")
def planned() -> PlanResult:
    batch = torch.randint(0, 60, (8, 17))
    return memopt.plan(
        GPT(layers=4, width=32, heads=2, context=16), batch, budget="1GiB", device=A_CPU, devices=2, layouts=[_TWO]
    )


def test_a_plan_with_a_pipeline_says_what_its_time_is_and_is_there_to_paste(planned):
    yaml = pytest.importorskip("yaml")
    best = planned.best
    assert best.strategy == "memopt_pp" and best.fits
    assert best.time_parts["idle"] > 0 and best.time_parts["communication"] > 0
    assert sum(best.time_parts.values()) == pytest.approx(best.relative_time)
    assert yaml.safe_load(best.yaml())["trainer"]["strategy"] == "memopt_pp"
    namespace: dict = {}
    exec(best.python(), namespace)
    assert type(namespace["trainer"].strategy) is memopt.PipelineParallelStrategy


@pytest.mark.slow
@pytest.mark.distributed
def test_the_largest_stage_of_a_plan_with_a_pipeline_holds_what_it_says():
    def measured() -> int:
        return memopt.measure_memory(
            ZOO["gpt2"].build(),
            ZOO["gpt2"].batch(),
            strategy=memopt.HybridStrategy(pipeline=2, shard=2),
            devices=4,
            callbacks=[memopt.ActivationCheckpointing("full")],
        ).peak_bytes

    layout = Layout("memopt_hybrid", MeshSizes(pipeline=2, shard=2))
    predicted = _tracer("gpt2").trace(Choice(layout, Techniques("full"))).peak.total_bytes
    assert predicted == pytest.approx(max(run_on_ranks(measured, 4, deadline_seconds=200)), rel=0.05)
