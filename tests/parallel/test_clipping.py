"""Norms and clipping of gradients that ranks hold whole, in shards, in part, or not at all."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lightning_memopt.parallel.clipping import clip_by_norm, clip_by_value, gradient_norm
from lightning_memopt.parallel.mesh import ParallelMesh, resolve_sizes
from tests.distributed import run_on_ranks

SHAPES = [(6, 4), (5,), (3, 2)]


def _gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _parameters(place: Any) -> list[nn.Parameter]:
    parameters = []
    for index, gradient in enumerate(_gradients()):
        placed = place(index, gradient)
        parameter = nn.Parameter(torch.zeros_like(gradient if placed is None else placed))
        parameter.grad = placed
        parameters.append(parameter)
    return parameters


def _mixed(mesh: DeviceMesh) -> list[nn.Parameter]:
    """A shard, a plain one, and one whose sum over ranks is pending."""

    def place(index: int, gradient: torch.Tensor) -> torch.Tensor:
        if index == 0:
            return distribute_tensor(gradient, mesh, [Shard(0)])
        if index == 2:
            return DTensor.from_local(gradient / mesh.size(), mesh, [Partial()])
        return gradient.clone()

    return _parameters(place)


def _whole(parameter: nn.Parameter) -> np.ndarray:
    gradient = parameter.grad
    assert gradient is not None
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).numpy()


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_shards_plain_and_pending_gradients_have_the_norm_of_one_device(norm_type):
    def norm() -> float:
        dist.init_process_group("gloo")
        return float(gradient_norm(_mixed(ParallelMesh("cpu", resolve_sizes(2, tensor=2)).tensor), norm_type))

    expected = float(torch.nn.utils.get_total_norm(_gradients(), norm_type))
    assert run_on_ranks(norm, 2) == pytest.approx([expected] * 2, rel=1e-6)


def test_clipping_by_norm_scales_every_gradient_as_one_device_does():
    def clip() -> list[np.ndarray]:
        dist.init_process_group("gloo")
        parameters = _mixed(ParallelMesh("cpu", resolve_sizes(2, shard=2)).shards)
        clip_by_norm(parameters, 0.5)
        return [_whole(parameter) for parameter in parameters]

    plain = _parameters(lambda index, gradient: gradient)
    torch.nn.utils.clip_grad_norm_(plain, 0.5)
    for clipped in run_on_ranks(clip, 2):
        for ours, parameter in zip(clipped, plain, strict=True):
            np.testing.assert_allclose(ours, _whole(parameter), rtol=1e-6)


def test_clipping_by_value_bounds_every_element_of_the_sum_over_ranks():
    def clip() -> list[np.ndarray]:
        dist.init_process_group("gloo")
        parameters = _mixed(ParallelMesh("cpu", resolve_sizes(2, shard=2)).shards)
        clip_by_value(parameters, 0.3)
        return [_whole(parameter) for parameter in parameters]

    for clipped in run_on_ranks(clip, 2):
        for ours, gradient in zip(clipped, _gradients(), strict=True):
            np.testing.assert_allclose(ours, gradient.clamp(-0.3, 0.3).numpy(), rtol=1e-6)


def test_stages_add_up_and_a_parameter_of_several_stages_counts_once():
    def norm() -> float:
        dist.init_process_group("gloo")
        mesh = ParallelMesh("cpu", resolve_sizes(2, pipeline=2))
        rank = dist.get_rank()
        # Of three parameters the first is on stage 0, the second on stage 1, the third (tied) on both.
        parameters = _parameters(lambda index, gradient: gradient if index in (rank, 2) else None)
        return float(
            gradient_norm(
                parameters, stages=mesh.pipeline.get_group(), counts=lambda p: rank == 0 or p is not parameters[2]
            )
        )

    expected = float(torch.nn.utils.get_total_norm(_gradients()))
    assert run_on_ranks(norm, 2) == pytest.approx([expected] * 2, rel=1e-6)


def test_two_dimensions_of_shards_are_one_norm():
    def norm() -> float:
        dist.init_process_group("gloo")
        mesh = ParallelMesh("cpu", resolve_sizes(4, shard=2, tensor=2)).whole["shard", "tensor"]
        placements = {0: [Shard(0), Shard(1)], 1: [Shard(0), Replicate()], 2: [Replicate(), Replicate()]}
        return float(gradient_norm(_parameters(lambda i, g: distribute_tensor(g, mesh, placements[i]))))

    expected = float(torch.nn.utils.get_total_norm(_gradients()))
    assert run_on_ranks(norm, 4) == pytest.approx([expected] * 4, rel=1e-6)


def test_shards_of_column_parallel_weights_count_once():
    def norm() -> float:
        dist.init_process_group("gloo")
        mesh = ParallelMesh("cpu", resolve_sizes(4, shard=2, tensor=2))
        layer = nn.Linear(4, 8, bias=False)
        parallelize_module(layer, mesh.tensor, ColwiseParallel())
        fully_shard(layer, mesh=mesh.shards)
        assert not layer.weight.placements[0].is_shard()
        whole = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
        layer.weight.grad = distribute_tensor(whole, layer.weight.device_mesh, layer.weight.placements)
        return float(gradient_norm(list(layer.parameters())))

    expected = float(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).norm())
    assert run_on_ranks(norm, 4) == pytest.approx([expected] * 4, rel=1e-6)
