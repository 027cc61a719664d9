"""Sizes of a mesh: resolved, refused with the right ones listed, and which batch a rank has."""

import re

import pytest
import torch.distributed as dist

from lightning_memopt.parallel.mesh import MeshSizes, ParallelMesh, resolve_sizes
from tests.distributed import run_on_ranks


def test_minus_one_is_the_rest_of_the_world():
    assert resolve_sizes(8, data=-1, tensor=2) == MeshSizes(data=4, tensor=2)
    assert resolve_sizes(8, pipeline=2, shard=-1, tensor=2) == MeshSizes(pipeline=2, shard=2, tensor=2)
    assert resolve_sizes(2, data=-1, tensor=2) == MeshSizes(tensor=2)


@pytest.mark.parametrize(
    ("world_size", "given", "message"),
    [
        (4, {"data": 3}, r"data=3.* makes 3, and there are 4 ranks.*data=4"),
        (4, {"data": 2}, r"makes 2, and there are 4 ranks.*data=4"),
        (8, {"data": 2, "tensor": 3}, r"makes 6.*8 ranks.*data=2, shard=1, tensor=4"),
        (6, {"data": -1, "tensor": 4}, r"makes 4 times the rest.*tensor=(3|6)"),
        (4, {"data": -1, "tensor": -1}, "data=-1 and tensor=-1: only one"),
        (4, {"tensor": 0}, "tensor=0 is no number of ranks"),
        (4, {"pipeline": True}, "pipeline=True is no number of ranks"),
        (4, {"shard": -2}, "shard=-2 is no number of ranks"),
        (4, {}, r"makes 1, and there are 4 ranks.*data=4"),
    ],
)
def test_sizes_whose_product_is_not_the_world_are_refused_with_the_right_ones_listed(world_size, given, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        resolve_sizes(world_size, **given)


def test_ranks_of_one_tensor_group_and_of_one_pipeline_share_a_batch():
    sizes = resolve_sizes(16, pipeline=2, data=2, shard=2, tensor=2)
    assert [sizes.batch_of(rank) for rank in range(16)] == [0, 0, 1, 1, 2, 2, 3, 3] * 2


def test_the_batch_group_holds_each_batch_once():
    def batches() -> list[int]:
        dist.init_process_group("gloo")
        sizes = resolve_sizes(4, pipeline=2, data=2)
        mesh = ParallelMesh("cpu", sizes)
        found: list[int] = [-1] * 2
        dist.all_gather_object(found, sizes.batch_of(dist.get_rank()), mesh.batch_group)
        return found

    assert run_on_ranks(batches, 4) == [[0, 1]] * 4


@pytest.mark.parametrize(
    ("given", "groups"),
    [({"shard": 4}, 1), ({"tensor": 4}, 2), ({"shard": 2, "tensor": 2}, 3)],
    ids=["shards: the world's", "tensor: and its own batch's", "both: and one for each"],
)
def test_dimensions_that_divide_nothing_have_no_process_group(given, groups):
    def count() -> int:
        dist.init_process_group("gloo")
        ParallelMesh("cpu", resolve_sizes(4, **given))
        return len(dist.distributed_c10d._world.pg_map)

    assert run_on_ranks(count, 4) == [groups] * 4
