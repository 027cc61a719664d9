"""What a choice adds to the time of its operators."""

import dataclasses

import pytest

from lightning_memopt.planning.operators import OperatorCall
from lightning_memopt.planning.space import Choice, Layout, Techniques
from lightning_memopt.planning.time_model import seconds_per_batch
from lightning_memopt.planning.trace import StepTrace
from tests.planning.a_cpu import A_CPU

_DEVICE = dataclasses.replace(
    A_CPU, operator_overhead=1.0, recompute_overheads={"full": 2.0, "selective": 5.0}, micro_batch_overhead=100.0
)


def _seconds(device=_DEVICE, micro_batches=1.0, **techniques):
    calls = tuple(OperatorCall(part, "aten.mm", "float32", 0, 0, 10) for part in ("forward", "recompute"))
    trace = StepTrace((), calls, (), micro_batches=micro_batches)
    return seconds_per_batch(trace, Choice(Layout(), Techniques(**techniques)), device, devices=1)


@pytest.mark.parametrize(("policy", "seconds"), [("full", 20.0), ("selective", 50.0), ("budget", 50.0)])
def test_calls_that_are_computed_again_take_what_their_policy_takes_around_them(policy, seconds):
    assert _seconds(checkpointing=policy)["recompute"] == pytest.approx(seconds)


def test_each_micro_batch_takes_its_part_of_the_loop_on_a_cpu_and_hides_behind_a_gpu():
    assert _seconds(micro_batches=4.0)["compute"] == pytest.approx(410.0)
    on_gpu = dataclasses.replace(_DEVICE, kind="cuda")
    assert _seconds(on_gpu, micro_batches=4.0)["compute"] == pytest.approx(10.0)
