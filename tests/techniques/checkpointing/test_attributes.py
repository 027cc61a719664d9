"""What blocks keep in plain attributes, and what stands in the place of their parameters."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_memopt.techniques.checkpointing import checkpoint_activations
from tests.techniques.checkpointing.policies import POLICIES


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def scale(self, x: torch.Tensor) -> Any:
        return 1.0

    def forward(self, x: torch.Tensor, given: Any = None) -> torch.Tensor:
        scale = self.scale(x) if given is None else float(given.random())
        return torch.sin(x + torch.tanh(self.linear(x * scale)))


class Counts(Block):
    calls = 0

    def scale(self, x: torch.Tensor) -> Any:
        self.calls += 1
        return self.calls


class Lists(Block):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def scale(self, x: torch.Tensor) -> Any:
        self.seen.append(1.0)
        return sum(self.seen)


class Remembers(Block):
    last: torch.Tensor | None = None

    def scale(self, x: torch.Tensor) -> Any:
        scale = 1.0 if self.last is None else self.last + 1
        self.last = x.detach().mean()
        return scale


class ChangesInPlace(Block):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(8)

    def scale(self, x: torch.Tensor) -> Any:
        return self.mean.mul_(0.9).add_(x.detach().mean(0)).clone()


class BuildsOnce(Block):
    table: torch.Tensor | None = None

    def scale(self, x: torch.Tensor) -> Any:
        if self.table is None:
            self.table = torch.linspace(0, 1, 8).cos()
        return self.table


def _step(blocks: nn.ModuleList, x: torch.Tensor, *given: Any) -> torch.Tensor:
    for block in blocks:
        x = block(x, *given)
    return x.square().sum()


def _train(make: type[Block], policy: str | None, step: Callable[..., torch.Tensor] = _step) -> list[Any]:
    """Gradients of each of three steps, and what the blocks hold at the end."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(make() for _ in range(4))
    handle = None if policy is None else checkpoint_activations(blocks, **POLICIES[policy], modules="*")
    gradients = []
    for _ in range(3):
        blocks.zero_grad()
        step(blocks, torch.linspace(0, 1, 16).reshape(2, 8)).backward()
        gradients += [parameter.grad.clone() for parameter in blocks.parameters()]
    if handle is not None:
        handle.remove()
    own = [{name: value for name, value in vars(block).items() if not name.startswith("_")} for block in blocks]
    return [gradients, own]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("block", [Counts, Lists, Remembers, ChangesInPlace, BuildsOnce])
def test_attributes_are_read_as_the_forward_read_them_and_written_once(block: type[Block], policy: str) -> None:
    torch.testing.assert_close(_train(block, policy), _train(block, None), rtol=0, atol=0)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_attribute_that_is_set_between_calls_is_replayed_as_each_call_found_it(policy: str) -> None:
    class Set(Block):
        factor = 1.0

        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def scale(self, x: torch.Tensor) -> Any:
            return self.dropout(x) * self.factor

    def step(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
        blocks.eval()
        for factor in (0.5, 2.0):
            for block in blocks:
                block.factor = factor
                x = block(x)
        blocks.train()
        return x.square().sum()

    torch.testing.assert_close(_train(Set, policy, step), _train(Set, None, step), rtol=0, atol=0)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_call_with_other_parameters_is_replayed_with_those(policy: str) -> None:
    def step(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            adapted = {name: parameter * 1.5 + 0.1 for name, parameter in block.named_parameters()}
            x = functional_call(block, adapted, (x,))
        return x.square().sum()

    torch.testing.assert_close(_train(Block, policy, step), _train(Block, None, step), rtol=0, atol=0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("make", [random.Random, np.random.default_rng])
def test_a_random_generator_that_a_block_is_given_is_replayed(make: Callable[[int], Any], policy: str) -> None:
    def train(policy: str | None) -> list[Any]:
        generator = make(0)
        trained = _train(Block, policy, lambda blocks, x: _step(blocks, x, generator))
        return [trained, generator.random()]

    torch.testing.assert_close(train(policy), train(None), rtol=0, atol=0)


@pytest.mark.parametrize("policy", ["selective", "budget"])
def test_a_hook_within_a_block_sees_no_look_at_it(policy: str) -> None:
    blocks = nn.ModuleList(Block() for _ in range(4))
    seen: list[torch.Tensor] = []
    for block in blocks:
        block.linear.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    with checkpoint_activations(blocks, **POLICIES[policy], modules="*"):
        loss = _step(blocks, torch.ones(2, 8))
        assert [type(output) for output in seen] == [torch.Tensor] * 4
        (loss + sum(output.sum() for output in seen)).backward()
