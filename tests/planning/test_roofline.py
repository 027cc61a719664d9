"""A step's time follows from what it computes, moves, sends and waits for, each by hand."""

import dataclasses

import pytest

from lightning_memopt.planning.devices import DeviceModel, Link
from lightning_memopt.planning.operators import OperatorCall
from lightning_memopt.planning.roofline import Transfer, step_time

_DEVICE = DeviceModel(
    name="made up",
    kind="cuda",
    memory_bytes=2**30,
    matmul_flops={"float32": 1e12, "bfloat16": 4e12},
    memory_bandwidth=1e9,
    host_link=1e8,
    granularity=512,
    workspace_bytes=0,
    operator_overhead=1e-3,
    links={"intra": Link(0.0, 1e8), "inter": Link(0.0, 1e7)},
    source="this test",
    date="",
    operator_rates={"aten.gelu float32": 5e8, "aten.convolution float32": 1e11},
)
_CPU = dataclasses.replace(_DEVICE, kind="cpu")


def _call(part="forward", name="aten.mm", dtype="float32", flops=0, moved_bytes=0, times=1) -> OperatorCall:
    return OperatorCall(part, name, dtype, flops, moved_bytes, times)


def test_an_operator_takes_the_slower_of_arithmetic_and_memory():
    assert step_time([_call(flops=10**12, moved_bytes=10**8)], _DEVICE).compute == pytest.approx(1.0)
    assert step_time([_call(flops=10**10, moved_bytes=10**8)], _DEVICE).compute == pytest.approx(0.1)


def test_lower_precision_and_slow_operators_go_at_their_own_rate():
    assert step_time([_call(flops=10**12, dtype="bfloat16")], _DEVICE).compute == pytest.approx(0.25)
    assert step_time([_call(name="aten.gelu", moved_bytes=10**9)], _DEVICE).compute == pytest.approx(2.0)
    assert step_time(
        [_call(name="aten.gelu", dtype="bfloat16", moved_bytes=10**9)], _DEVICE
    ).compute == pytest.approx(1.0)
    convolution = _call(name="aten.convolution", flops=10**11, moved_bytes=10**7)
    assert step_time([convolution], _DEVICE).compute == pytest.approx(1.0)
    assert step_time([_call(name="aten.add", moved_bytes=10**9)], _DEVICE).compute == pytest.approx(1.0)


def test_issuing_hides_behind_a_gpu_that_is_busy_and_adds_up_on_a_cpu():
    small, large = _call(times=5), _call(moved_bytes=10**9)
    assert step_time([small], _DEVICE).compute == pytest.approx(5e-3)
    assert step_time([large], _DEVICE).compute == pytest.approx(1.0)
    assert step_time([large], _CPU).compute == pytest.approx(1.001)


def test_a_call_that_is_computed_again_takes_what_checkpointing_takes_around_it():
    calls = [_call(part=part, times=10) for part in ("forward", "recompute")]
    plain, slow = step_time(calls, _CPU), step_time(calls, _CPU, recompute_overhead=0.5)
    assert plain.recompute == plain.compute == slow.compute == pytest.approx(10 * _CPU.operator_overhead)
    assert slow.recompute == pytest.approx(5.0)


def test_ranks_that_share_a_processor_share_its_rates():
    alone, shared = (step_time([_call(flops=10**12)], _CPU, sharing=ranks).compute for ranks in (1, 4))
    assert shared == pytest.approx(4 * (alone - 1e-3) + 1e-3)


def test_parts_are_told_apart_and_sum_to_the_whole():
    calls = [_call(part, flops=10**12) for part in ("forward", "backward", "recompute", "optimizer")]
    time = step_time(calls, _DEVICE)
    assert time.parts == pytest.approx(
        {"compute": 2.0, "recompute": 1.0, "optimizer": 1.0, "communication": 0.0, "offload": 0.0, "idle": 0.0}
    )
    assert time.seconds == pytest.approx(4.0)


def test_communication_hides_behind_computing_only_where_it_may_and_can():
    calls = [_call(flops=10**12)]
    plain = Transfer("all_reduce", 10**8, ranks=2)  # a second
    beside = plain._replace(is_overlapped=True)
    assert step_time(calls, _DEVICE, transfers=[plain]).communication == pytest.approx(1.0)
    assert step_time(calls, _DEVICE, transfers=[beside]).communication == pytest.approx(0.1)
    assert step_time(calls, _DEVICE, transfers=[beside._replace(times=3)]).communication == pytest.approx(2.1)
    assert step_time(calls, _CPU, transfers=[beside]).communication == pytest.approx(1.0)


def test_offload_goes_over_the_hosts_link():
    assert step_time([], _DEVICE, transfers=[Transfer("offload", 10**8)]).offload == pytest.approx(1.0)


def test_a_network_between_nodes_is_slower_than_the_link_within():
    within, across = (
        step_time([], _DEVICE, transfers=[Transfer("all_reduce", 10**8, ranks=2, nodes=nodes)]) for nodes in (1, 2)
    )
    assert across.communication == pytest.approx(10 * within.communication)
