"""Traces that are cheaper than two whole steps say the same; and a plan needs few of them."""

import pytest
import torch

import lightning_memopt as memopt
from lightning_memopt.parallel.mesh import MeshSizes
from lightning_memopt.planning.space import Choice, Layout, Techniques
from lightning_memopt.planning.trace import StepTracer
from tests.planning.a_cpu import A_CPU
from tests.planning.test_plan import Deep, _batch
from tests.planning.test_predict_as_written import TakesADataclass, _Net, _Signals
from tests.zoo import ZOO

_SHARDS = Layout("memopt_zero3", MeshSizes(shard=2))


def _tracer(name: str) -> StepTracer:
    module, batch = ZOO[name].build(), ZOO[name].batch()
    return StepTracer(module, module, batch, {})


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("mlp", Choice(Layout(), Techniques())),
        ("llama", Choice(_SHARDS, Techniques("selective"))),
        pytest.param("llama", Choice(Layout(), Techniques()), marks=pytest.mark.slow),
        pytest.param("gpt2", Choice(Layout(), Techniques("full", micro_batch=2)), marks=pytest.mark.slow),
        pytest.param("gpt2", Choice(_SHARDS, Techniques()), marks=pytest.mark.slow),
        pytest.param(
            "gpt2", Choice(Layout("memopt_zero2", MeshSizes(shard=2)), Techniques()), marks=pytest.mark.slow
        ),
        pytest.param("cnn", Choice(Layout(), Techniques()), marks=pytest.mark.slow),
    ],
)
def test_one_step_with_the_optimizers_state_made_before_peaks_where_the_second_of_two_does(name, choice):
    tracer = _tracer(name)
    second, alone = (tracer._step(choice, None, prepares=prepares) for prepares in (False, True))
    assert alone.peak.total_bytes == second.peak.total_bytes
    assert sum(c.flops * c.times for c in alone.operators) == sum(c.flops * c.times for c in second.operators)


class KeepsItsFirstOutput(Deep):
    """Of which the first step is not like the others."""

    def training_step(self, batch, batch_idx):
        if not hasattr(self, "kept"):
            self.kept = [batch[0] * 2 for _ in range(8)]
        return super().training_step(batch, batch_idx)


def test_where_the_first_step_is_not_like_the_second_the_second_is_traced():
    module, batch = KeepsItsFirstOutput(), _batch()
    trace = StepTracer(module, module, batch, {}).trace(Choice(Layout(), Techniques()))
    assert trace.peak.total_bytes == memopt.predict_memory(KeepsItsFirstOutput(), batch).peak_bytes


def test_micro_batches_of_a_frozen_dataclass_are_traced_as_those_of_its_tensor():
    values, choice = torch.randn(64, 128), Choice(Layout(), Techniques(micro_batch=8))
    peaks = [
        StepTracer(module, module, batch, {}).trace(choice).peak.total_bytes
        for module, batch in ((_Net(), values), (TakesADataclass(), _Signals(values)))
    ]
    assert peaks[0] == peaks[1]


def _count_steps(monkeypatch, **options) -> int:
    steps, run = [], StepTracer._step

    def counted(self, choice, *arguments, **options):
        steps.append(choice)
        return run(self, choice, *arguments, **options)

    monkeypatch.setattr(StepTracer, "_step", counted)
    memopt.plan(lambda: Deep(2, 64), _batch(64, 64), device=A_CPU, devices=8, **options)
    return len(steps)


def test_where_there_is_room_on_eight_devices_a_plan_takes_a_trace_for_each_plan_that_is_wanted(monkeypatch):
    # and two more, to see that one step is like another
    assert _count_steps(monkeypatch, budget="1GiB") == 3 + 2


@pytest.mark.slow
def test_a_tight_budget_on_eight_devices_takes_a_part_of_the_hundreds_of_choices(monkeypatch):
    whole = memopt.predict_memory(Deep(2, 64), _batch(64, 64)).peak_bytes
    assert _count_steps(monkeypatch, budget=whole // 2) <= 20
