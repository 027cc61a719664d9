"""A pipeline is planned from few of its stages and micro-batches, and these say what all of them do."""

import dataclasses

import lightning.pytorch as pl
import pytest
import torch

import lightning_memopt as memopt
from lightning_memopt.parallel.mesh import MeshSizes
from lightning_memopt.parallel.pipeline.splitting import Partition
from lightning_memopt.parallel.pipeline.timing import pipeline_idle
from lightning_memopt.planning import plan as planner
from lightning_memopt.planning import trace as tracing
from lightning_memopt.planning.explain import explain
from lightning_memopt.planning.operators import Collective, OperatorCall
from lightning_memopt.planning.plan import PlanResult
from lightning_memopt.planning.read_module import most_stages
from lightning_memopt.planning.search import Evaluation
from lightning_memopt.planning.space import Choice, Layout, Techniques, find_layouts, widest_tensor
from lightning_memopt.planning.stages import Stages, stages_to_trace
from lightning_memopt.planning.time_model import seconds_per_batch
from lightning_memopt.planning.trace import StepTrace, StepTracer
from tests.distributed import run_on_ranks
from tests.planning.a_cpu import A_CPU
from tests.zoo import ZOO
from tests.zoo.text import LossOutside

_TWO = Layout("memopt_pp", MeshSizes(pipeline=2))
_FOUR = Choice(Layout("memopt_pp", MeshSizes(pipeline=4)), Techniques())


def _tracer(name: str) -> StepTracer:
    module, batch = ZOO[name].build(), ZOO[name].batch()
    return StepTracer(module, module, batch, {})


def _times(trace: StepTrace) -> dict[tuple, float]:
    return {call[:-1]: call.times for call in trace.operators}


def _deep_gpt2() -> pl.LightningModule:
    """Its second stage has the head, which costs more than a block, and fewer blocks than the first."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=512, n_positions=16, n_embd=16, n_layer=17, n_head=2, use_cache=False,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LossOutside(GPT2LMHeadModel(config))


@pytest.mark.parametrize("name", ["mlp", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_one_more_micro_batch_than_stages_peak_where_all_do(name, monkeypatch):
    def peaks() -> list[int]:
        traces = _tracer(name).trace(Choice(_TWO, Techniques())).stages.traces
        return [traces[stage].peak.total_bytes for stage in (0, 1)]

    few = peaks()
    monkeypatch.setattr(tracing, "few_micro_batches", lambda batch, stages, stage: (batch, 8))
    assert few == pytest.approx(peaks(), rel=0.005)


@pytest.mark.parametrize(
    "techniques",
    [
        pytest.param(Techniques(), id="plain"),
        pytest.param(Techniques("full", chunked_loss=True), id="full", marks=pytest.mark.slow),
    ],
)
def test_few_blocks_of_a_stage_tell_of_all_that_it_has(techniques, monkeypatch):
    module, choice = _deep_gpt2(), Choice(_TWO, techniques)
    batch = {name: torch.randint(0, 512, (8, 16)) for name in ("input_ids", "labels")}
    few = StepTracer(module, module, batch, {}).trace(choice)
    monkeypatch.setattr(tracing, "is_deep", lambda stack, stages: False)
    whole = StepTracer(module, module, batch, {}).trace(choice)
    assert len(module.model.transformer.h) == 17
    assert few.stages.costs == pytest.approx(whole.stages.costs)
    assert few.stages.traces.keys() == whole.stages.traces.keys()
    for stage, trace in whole.stages.traces.items():
        assert few.stages.traces[stage].peak.by_category == trace.peak.by_category
        assert _times(few.stages.traces[stage]) == pytest.approx(_times(trace))


def test_stages_between_are_traced_where_they_may_hold_the_most():
    def traced(*starts: int, links: int) -> list[int]:
        names = tuple(f"blocks.{number}" for number in range(links))
        return stages_to_trace(Partition(names, starts, costs=(1.0,) * len(starts)))

    assert traced(0, 2, 4, 6, links=8) == [0, 3]
    assert traced(0, 2, 5, 8, links=10) == [0, 1, 3]
    assert traced(0, 4, 7, 12, links=14) == [0, 2, 3]


def _stages(*forwards: float, send_bytes: int = 0) -> StepTrace:
    """A pipeline of which all stages were traced, with the seconds of their forwards on the device of these tests."""
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


def _pipelines(devices: int, nodes: int, **options: int) -> set[MeshSizes]:
    layouts = find_layouts(devices, nodes, has_host=True, **options)
    return {layout.sizes for layout in layouts if layout.sizes.pipeline > 1}


def test_pipelines_are_in_the_space_as_far_as_module_and_batch_can_be_cut():
    module, batch = ZOO["gpt2"].build(), ZOO["gpt2"].batch()
    assert most_stages(module, batch) == 3
    assert most_stages(ZOO["cnn"].build(), ZOO["cnn"].batch()) == 1  # its statistics would be of micro-batches
    assert _pipelines(8, 1, most_stages=3) == {MeshSizes(pipeline=2, shard=4)}
    assert _pipelines(8, 2, most_stages=3) == {MeshSizes(pipeline=2, shard=8), MeshSizes(pipeline=2, tensor=8)}
    assert _pipelines(8, 1, most_stages=8) == {MeshSizes(2, shard=4), MeshSizes(4, shard=2), MeshSizes(8)}
    assert _pipelines(8, 2) == set()


def test_matrix_products_are_split_among_a_power_of_two_of_the_devices_of_a_node():
    assert [widest_tensor(devices) for devices in (1, 2, 3, 6, 8, 12)] == [1, 2, 1, 2, 8, 4]
    for devices, nodes in ((6, 1), (6, 2), (3, 2), (8, 4)):
        for layout in find_layouts(devices, nodes, has_host=True, most_stages=8):
            assert widest_tensor(devices) % layout.sizes.tensor == 0, layout
    assert _pipelines(6, 2, most_stages=2) == {MeshSizes(2, shard=6), MeshSizes(2, shard=3, tensor=2)}


@pytest.mark.slow
def test_the_fewest_devices_are_looked_for_with_matrix_products_split_as_a_plan_would(monkeypatch):
    tried = set()

    def fits_nowhere(choices, *_):
        tried.update(each.layout.sizes.tensor for each in choices)
        return False

    monkeypatch.setattr(planner, "may_fit", fits_nowhere)
    entry = ZOO["mlp"]
    result = memopt.plan(entry.build(), entry.batch(), budget="8KiB", device=A_CPU, devices=6)
    assert result.fewest_devices is None and tried == {1, 2}


@pytest.fixture(scope="module")
def planned() -> PlanResult:
    return memopt.plan(
        ZOO["mlp"].build(), ZOO["mlp"].batch(), budget="1GiB", device=A_CPU, devices=2, layouts=[_TWO], wanted=1
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


def test_a_plan_says_what_its_layout_bought_before_its_techniques():
    replicas = Choice(Layout("memopt_ddp", MeshSizes(data=4)), Techniques())
    evaluated = {
        choice: Evaluation(peak_bytes, {}, {"compute": seconds})
        for choice, peak_bytes, seconds in (
            (replicas, 8 * 2**20, 1.0),
            (_FOUR, 3 * 2**20, 1.25),
            (dataclasses.replace(_FOUR, techniques=Techniques("full")), 2**20, 1.5),
        )
    }
    assert explain([*evaluated][-1], evaluated) == (
        "memopt_pp pipeline=4: -5.0 MiB for +25% time",
        "full checkpointing: -2.0 MiB for +20% time",
    )


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("inner", ["shard", "tensor"])
def test_the_largest_stage_of_a_plan_with_a_pipeline_holds_what_it_says(inner):
    def measured() -> int:
        return memopt.measure_memory(
            ZOO["gpt2"].build(),
            ZOO["gpt2"].batch(),
            strategy=memopt.HybridStrategy(pipeline=2, **{inner: 2}),
            devices=4,
            callbacks=[memopt.ActivationCheckpointing("full")],
        ).peak_bytes

    layout = Layout("memopt_hybrid", MeshSizes(pipeline=2, **{inner: 2}))
    predicted = _tracer("gpt2").trace(Choice(layout, Techniques("full"))).peak.total_bytes
    assert predicted == pytest.approx(max(run_on_ranks(measured, 4, deadline_seconds=200)), rel=0.05)
