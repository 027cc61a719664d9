"""Blocks whose layers tensor parallelism splits keep what a policy chooses, though their parameters are DTensors."""

import logging

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_memopt.parallel.tensor.apply import tensor_parallelize
from lightning_memopt.parallel.tensor.plan import find_tensor_plan
from lightning_memopt.techniques.checkpointing import checkpoint_activations
from tests.distributed import run_on_ranks

POLICIES = {"full": {}, "selective": {}, "budget": {"budget": 0.9}}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class _CountProducts(TorchDispatchMode):
    """Of what runs: what a checkpoint takes from what it kept does not come so far."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def _second_step(policy: str | None) -> tuple[list[Tensor], int, list[bool]]:
    """Whole gradients, how many matrix products ran, and whether ranks were found to be able to work on parts."""
    torch.manual_seed(0)
    net = nn.Sequential(*(Block(16) for _ in range(3)))
    x = torch.randn(8, 16)
    size = dist.get_world_size()
    split = tensor_parallelize(net, init_device_mesh("cpu", (size,)), find_tensor_plan(net, size))
    if policy is not None:
        checkpoint_activations(net, policy, **POLICIES[policy])
    for _ in range(2):
        net.zero_grad()
        with _CountProducts() as products:
            net(x).square().sum().backward()
    gradients = [parameter.grad for parameter in net.parameters()]
    whole = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in gradients]
    return whole, products.count, [region.is_local for region in split.regions]


@pytest.mark.distributed
def test_a_split_block_keeps_the_products_that_a_policy_chooses_and_its_gradients_are_the_same(caplog):
    def compare() -> None:
        dist.init_process_group("gloo")
        expected, plain, verified = _second_step(None)
        products = {}
        for policy in POLICIES:
            with caplog.at_level(logging.WARNING, "lightning_memopt"):
                gradients, products[policy], found = _second_step(policy)
            assert found == verified and all(found) and found, policy
            assert not caplog.messages, caplog.messages
            for ours, theirs in zip(gradients, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
        assert plain == products["selective"] == products["budget"] < products["full"], (plain, products)

    run_on_ranks(compare, 2, deadline_seconds=200)
