"""What a prediction for a GPU has that one of a CPU has not."""

import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_common import _chunk_with_empty

from lightning_memopt.parallel.mesh import MeshSizes
from lightning_memopt.planning.devices import device_model
from lightning_memopt.planning.own_chunks import _Chunks, cutting_own_chunks
from lightning_memopt.planning.space import Choice, Layout, Techniques
from lightning_memopt.planning.trace import StepTrace, StepTracer
from tests.planning.test_plan import Deep, _batch

_PARAMETERS = [parameter.nbytes for parameter in Deep(2, 64).parameters()]


def _trace(module: Deep, gpu: str | None, layout: Layout = Layout()) -> StepTrace:  # noqa: B008
    device = None if gpu is None else device_model(gpu)
    return StepTracer(module, module, _batch(8, 64), {}, device).trace(Choice(layout, Techniques()))


def _stepping(trace: StepTrace) -> int:
    return max(point.by_category["temporaries"] for point in trace.points if point.phase == "step")


class StepsOneByOne(Deep):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, foreach=False)


def test_each_tensor_takes_a_multiple_of_what_the_allocator_hands_out():
    trace = _trace(Deep(2, 64), "h100")
    rounded = sum(-(-size // 512) * 512 for size in _PARAMETERS)
    assert rounded > sum(_PARAMETERS)
    assert {point.by_category["parameters"] for point in trace.points} == {rounded}
    assert all(size % 512 == 0 for point in trace.points for size in point.by_category.values())


def test_an_optimizer_that_leaves_it_to_pytorch_has_a_temporary_of_each_tensor_at_once():
    assert _stepping(_trace(Deep(2, 64), "h100")) >= sum(_PARAMETERS)
    assert _stepping(_trace(Deep(2, 64), None)) < sum(_PARAMETERS)
    assert _stepping(_trace(StepsOneByOne(2, 64), "h100")) < sum(_PARAMETERS)


def test_shards_are_stepped_together_too_and_their_temporaries_are_shards():
    layout = Layout("memopt_zero3", MeshSizes(shard=2))
    step = _stepping(_trace(Deep(2, 64), "h100", layout))
    # The gradients of FSDP2 and the temporaries of the optimizer.
    assert 1.9 * sum(_PARAMETERS) / 2 < step < 1.5 * sum(_PARAMETERS)


def test_the_time_of_an_optimizer_counts_what_lists_of_tensors_move():
    moved = {
        gpu: sum(
            call.moved_bytes * call.times for call in _trace(Deep(2, 64), gpu).operators if call.part == "optimizer"
        )
        for gpu in ("h100", None)
    }
    assert moved["h100"] == pytest.approx(moved[None], rel=0.25)


@pytest.mark.parametrize(("rows", "count"), [(8, 4), (7, 4), (3, 8), (5, 1), (9, 5)])
def test_chunks_that_are_cut_when_asked_for_are_those_that_fsdp_cuts(rows, count):
    tensor = torch.randn(rows, 3)
    expected, lazy = _chunk_with_empty(tensor, count, 0), _Chunks(tensor, count, 0)
    for index in range(count):
        assert torch.equal(lazy[index], expected[index])
        assert lazy[index].numel() == 0 or lazy[index].data_ptr() == expected[index].data_ptr()


def test_fsdp_cuts_all_chunks_again_afterwards():
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    with cutting_own_chunks():
        assert _fsdp_param._chunk_with_empty is _Chunks
    assert _fsdp_param._chunk_with_empty is _chunk_with_empty
