import copy
import logging
import random
import re
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_memopt.memory.track import track_memory
from lightning_memopt.techniques.checkpointing import checkpoint_activations
from lightning_memopt.techniques.checkpointing.replay import ALWAYS_COPIED
from tests.techniques.checkpointing.policies import POLICIES
from tests.zoo import ZOO


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(32, 128)
        self.down = nn.Linear(128, 32)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.dropout(nn.functional.gelu(self.up(x)))
        return x + self.down(hidden if scale is None else hidden * scale)


class Stack(nn.Module):
    def __init__(self, depth: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _step(module: nn.Module, x: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    module.zero_grad()
    torch.manual_seed(seed)
    module(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def _calls(module: nn.Module, x: torch.Tensor) -> dict[str, int]:
    with _Count() as count:
        module(x).sum().backward()
    return count.calls


@pytest.fixture
def stack() -> Stack:
    torch.manual_seed(0)
    return Stack()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(1))


def test_full_runs_every_block_again_and_every_k_all_but_each_kth(stack: Stack, x: torch.Tensor) -> None:
    assert _calls(stack, x)["gelu"] == 4
    with checkpoint_activations(stack, "full"):
        assert _calls(stack, x)["gelu"] == 8
    with checkpoint_activations(stack, "every_k", k=2) as handle:
        assert handle.names == ["blocks.0", "blocks.2"]
        assert _calls(stack, x)["gelu"] == 6


def test_selective_runs_the_cheap_operators_again_and_no_product(stack: Stack, x: torch.Tensor) -> None:
    plain = _calls(stack, x)
    with checkpoint_activations(stack, "selective"):
        selective = _calls(stack, x)
    assert selective["gelu"] == 2 * plain["gelu"]
    assert selective["addmm"] == plain["addmm"]


def test_the_budget_is_met_from_the_second_step_on() -> None:
    module, batch = Stack(depth=10), torch.randn(256, 32)
    module(batch).sum().backward()

    def activations() -> int:
        with track_memory(module) as tracker:
            module(batch).sum().backward()
        return tracker.report().by_category["activations"]

    plain, peaks = activations(), {}
    for budget in (0.3, 0.5, 0.8):
        with checkpoint_activations(module, "budget", budget=budget):
            module(batch).sum().backward()
            peaks[budget] = activations() / plain
    assert all(peak <= budget for budget, peak in peaks.items()), peaks
    assert peaks[0.3] < peaks[0.5] < peaks[0.8]


def test_a_budget_that_cannot_be_reached_says_what_can(stack: Stack, x: torch.Tensor, caplog) -> None:
    with caplog.at_level(logging.WARNING), checkpoint_activations(stack, "budget", budget=0.01):
        _step(stack, x)
        _step(stack, x)
    assert "a budget of 0.01 of the activation memory is" in caplog.text


@pytest.mark.parametrize("policy", POLICIES)
def test_dropout_masks_are_replayed_and_the_random_state_goes_on_as_in_plain_training(policy: str, x) -> None:
    module = Stack(dropout=0.3)
    expected = [_step(module, x, seed) for seed in range(3)]
    state = torch.get_rng_state()
    with checkpoint_activations(module, **POLICIES[policy]):
        for seed, gradients in enumerate(expected):
            assert all(torch.equal(g, gradients[name]) for name, g in _step(module, x, seed).items())
    assert torch.equal(torch.get_rng_state(), state)


class DropsLayers(Block):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * random.choice([-3.0, -1.0, 2.0])
        return super().forward(x) if np.random.rand() < 0.5 else x + self.other(x)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_block_draws_from_python_and_numpy_is_replayed_and_both_go_on_as_in_plain_training(policy, x) -> None:
    def train(module: nn.Module) -> tuple[Any, ...]:
        random.seed(1)
        np.random.seed(1)
        return [_step(module, x) for _ in range(3)], random.random(), np.random.rand()

    module = Stack()
    module.blocks = nn.ModuleList(DropsLayers() for _ in range(6))
    plain = train(module)
    with checkpoint_activations(module, **POLICIES[policy]):
        checkpointed = train(module)
    torch.testing.assert_close(checkpointed, plain)


class DrawsFromItsOwn(Block):
    def __init__(self) -> None:
        super().__init__()
        self.masks, self.dice, self.rng = torch.Generator(), random.Random(), np.random.default_rng()

    def seed(self, number: int) -> None:
        self.masks.manual_seed(number)
        self.dice.seed(number)
        self.rng.bit_generator.state = np.random.default_rng(number).bit_generator.state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.rand(x.shape, generator=self.masks) < 0.7
        return super().forward(x * mask * self.dice.random() * self.rng.random())


@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_block_draws_from_generators_of_its_own_is_replayed_and_they_go_on_as_in_plain_training(policy, x):
    def train(module: nn.Module) -> tuple[Any, ...]:
        for number, block in enumerate(module.blocks):
            block.seed(number)
        gradients = [_step(module, x) for _ in range(3)]
        return gradients, [(b.masks.get_state(), b.dice.random(), b.rng.random()) for b in module.blocks]

    module = Stack()
    module.blocks = nn.ModuleList(DrawsFromItsOwn() for _ in range(6))
    plain = train(module)
    with checkpoint_activations(module, **POLICIES[policy]):
        checkpointed = train(module)
    torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("policy", ["selective", "budget"])
def test_a_gradient_penalty_is_right_where_nothing_is_kept_and_else_right_or_refused_by_name(policy, stack, x):
    def penalize() -> list[torch.Tensor]:
        stack.zero_grad()
        leaf = x.detach().requires_grad_()
        out = stack(leaf).sum()
        (slope,) = torch.autograd.grad(out, leaf, create_graph=True)
        (out + slope.square().sum()).backward()
        return [parameter.grad.clone() for parameter in stack.parameters()]

    plain = penalize()
    with checkpoint_activations(stack, "full"):
        torch.testing.assert_close(penalize(), plain)
    with checkpoint_activations(stack, **POLICIES[policy]):
        _step(stack, x)
        try:
            torch.testing.assert_close(penalize(), plain)  # with torch 2.11
        except RuntimeError as error:
            assert re.search(r"blocks\.\d is recomputed for a second backward .*policy 'full'", str(error))


@pytest.mark.parametrize("policy", POLICIES)
def test_running_statistics_and_counters_move_once_per_step(policy: str) -> None:
    entry = ZOO["cnn"]
    plain, module = entry.build(), entry.build()
    images = entry.batch()[0]
    for net in (plain, module):
        net.forward = lambda x, net=net: net.head(net.blocks(net.stem(x)))
    _step(plain, images)
    _step(plain, images)
    with checkpoint_activations(module, **POLICIES[policy]):
        _step(module, images)
        _step(module, images)
    for name, buffer in plain.named_buffers():
        assert torch.equal(module.get_buffer(name), buffer), name


def test_a_buffer_that_a_block_writes_itself_is_written_once_and_read_as_it_was() -> None:
    class Counting(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x) * self.calls.clone()
            self.calls.add_(1)
            return out

    plain = nn.Sequential(Counting(), Counting())
    module, x = copy.deepcopy(plain), torch.randn(4, 32)
    expected = [_step(plain, x) for _ in range(3)]
    with checkpoint_activations(module, "full"):
        for gradients in expected:
            assert all(torch.equal(g, gradients[name]) for name, g in _step(module, x).items())
    assert torch.equal(module[0].calls, torch.tensor(4.0))


class Averaging(Block):
    """Subtracts an average of its outputs, which it begins to take in call number ``first``."""

    def __init__(self, assigns: bool, first: int, size: int) -> None:
        super().__init__()
        self.assigns, self.first = assigns, first
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("average", torch.zeros(size, 1, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        self.calls += 1
        if self.calls >= self.first:
            if self.assigns:
                self.average = 0.9 * self.average + 0.1 * out.detach().mean(0)
            else:
                self.average.mul_(0.9).add_(out.detach().mean(0), alpha=0.1)
        return (out - self.average.mean(0)).sin()


LARGE = 2 * ALWAYS_COPIED // (4 * 32)


@pytest.mark.parametrize(
    ("assigns", "first", "size"), [(True, 1, 1), (True, 3, 1), (False, 3, 1), (True, 3, LARGE), (False, 1, LARGE)]
)
def test_a_buffer_that_is_assigned_or_first_written_in_a_later_call_is_written_once(assigns, first, size) -> None:
    plain = nn.Sequential(Averaging(assigns, first, size), Averaging(assigns, first, size))
    module, x = copy.deepcopy(plain), torch.randn(4, 32)
    expected = [_step(plain, x) for _ in range(5)]
    with checkpoint_activations(module, "full"):
        for gradients in expected:
            assert all(torch.equal(g, gradients[name]) for name, g in _step(module, x).items())
    for name, buffer in plain.named_buffers():
        assert torch.equal(module.get_buffer(name), buffer), name


def test_what_is_kept_of_a_block_with_buffers_is_what_its_replay_finds(x: torch.Tensor) -> None:
    class Scaled(Block):
        def __init__(self, writes: bool) -> None:
            super().__init__()
            self.register_buffer("scale", torch.full((32,), 2.0))
            self.writes = writes

        def forward(self, x: torch.Tensor, *, scale: torch.Tensor | None = None) -> torch.Tensor:
            if self.writes:
                self.scale.mul_(0.5)
            # Copying is an operator that copies of the buffer would be taken for.
            return super().forward((x * self.scale).transpose(0, 1).clone().transpose(0, 1))

    def build() -> Stack:
        torch.manual_seed(0)
        stack = Stack()
        stack.blocks = nn.ModuleList(Scaled(writes=bool(index % 2)) for index in range(4))
        return stack

    plain, checkpointed = build(), build()
    with checkpoint_activations(checkpointed, "budget", budget=0.9):
        for _ in range(3):
            torch.testing.assert_close(_step(checkpointed, x), _step(plain, x), rtol=0, atol=0)


@pytest.mark.parametrize("policy", ["selective", "budget"])
def test_what_collects_the_outputs_of_a_block_sees_each_call_once(policy: str, stack: Stack, x: torch.Tensor) -> None:
    collected: list[torch.Tensor] = []
    inner: ContextVar[list[torch.Tensor]] = ContextVar("inner")
    for block in stack.blocks:
        block.register_forward_hook(lambda module, args, output: collected.append(output))
        block.up.register_forward_hook(lambda module, args, output: inner.get([]).append(output))
    with checkpoint_activations(stack, **POLICIES[policy]):
        token = inner.set([])
        stack(x)
        assert len(collected) == len(inner.get()) == len(stack.blocks)
        assert all(type(output) is torch.Tensor for output in (*collected, *inner.get()))
        inner.reset(token)


def test_a_large_buffer_first_written_in_place_in_a_later_call_is_refused_by_name() -> None:
    module = nn.Sequential(Averaging(False, 2, LARGE), Averaging(False, 2, LARGE))
    with checkpoint_activations(module, "full"):
        _step(module, torch.randn(4, 32))
        with pytest.raises(RuntimeError, match="Averaging writes its buffer 'average' in place"):
            _step(module, torch.randn(4, 32))


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_frozen_blocks_and_inputs_without_gradients_train_the_same(policy: str, stack: Stack, x) -> None:
    stack.blocks[0].requires_grad_(False)
    stack.blocks[2].requires_grad_(False)
    expected = _step(stack, x)
    with checkpoint_activations(stack, policy):
        found = _step(stack, x)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], g) for name, g in expected.items())


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_keyword_tensors_get_their_gradients(policy: str, x: torch.Tensor) -> None:
    net = nn.ModuleList([Block(), Block()])
    scale = torch.rand(128, requires_grad=True)

    def gradient() -> torch.Tensor:
        scale.grad = None
        net[1](net[0](x, scale=scale), scale=scale).sum().backward()
        return scale.grad.clone()

    expected = gradient()
    with checkpoint_activations(net, policy):
        assert torch.equal(gradient(), expected)


def test_an_in_place_activation_after_a_product_is_recomputed_rather_than_kept_wrong(x: torch.Tensor) -> None:
    block = [nn.Sequential(nn.Linear(32, 32), nn.ReLU(inplace=True), nn.Linear(32, 32)) for _ in range(3)]
    net = nn.Sequential(*block)
    expected = _step(net, x)
    with checkpoint_activations(net, "selective"):
        assert all(torch.equal(g, expected[name]) for name, g in _step(net, x).items())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_a_block_runs_as_it_is(context, stack: Stack, x: torch.Tensor) -> None:
    with checkpoint_activations(stack, "selective"), context():
        before = torch.get_rng_state()
        with _Count() as count:
            stack(x)
        assert count.calls["gelu"] == 4
        assert torch.equal(before, torch.get_rng_state())


def test_removing_the_handle_twice_or_after_an_exception_leaves_no_trace(stack: Stack, x: torch.Tensor) -> None:
    keys = list(stack.state_dict())
    stack.blocks[1].forward = stack.blocks[1].forward  # an instance's own forward is given back
    handle = checkpoint_activations(stack, "full")
    assert list(stack.state_dict()) == keys
    handle.remove()
    handle.remove()
    with pytest.raises(KeyError), checkpoint_activations(stack, "selective"):
        raise KeyError
    assert [name for name, module in stack.named_modules() if "forward" in module.__dict__] == ["blocks.1"]


def test_a_copy_made_while_checkpointing_runs_its_own_weights(stack: Stack, x: torch.Tensor) -> None:
    with checkpoint_activations(stack, "full"):
        twin = copy.deepcopy(stack)
        for parameter in twin.parameters():
            nn.init.zeros_(parameter)
        assert torch.equal(twin(x), x)


def test_a_block_that_branches_on_values_is_recomputed_in_full_and_says_so(x: torch.Tensor, caplog) -> None:
    class Branching(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() > 1e9 else super().forward(x) * 2

    net = nn.Sequential(Branching(), Branching())
    expected = _step(net, x)
    with caplog.at_level(logging.WARNING), checkpoint_activations(net, "selective"):
        assert all(torch.equal(g, expected[name]) for name, g in _step(net, x).items())
    assert "cannot be profiled on fake tensors" in caplog.text


def test_a_key_value_cache_is_not_filled_twice() -> None:
    entry = ZOO["gpt2"]
    module, batch = entry.build(), entry.batch()
    module.model.config.use_cache = True
    plain = module.model(**batch).loss
    with checkpoint_activations(module, "full"), pytest.warns(UserWarning, match="h.0 was given a key-value cache"):
        loss = module.model(**batch).loss
        loss.backward()
    assert torch.equal(loss, plain)


@pytest.mark.parametrize("trained", [True, False])
def test_a_parameter_that_a_block_writes_itself_is_refused_by_name(trained) -> None:
    class Follows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.mean = nn.Parameter(torch.zeros(4), requires_grad=trained)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.1)
            return self.linear(x) - self.mean

    net = nn.Sequential(Follows(), Follows(), Follows())
    with (
        checkpoint_activations(net, "full"),
        pytest.raises(RuntimeError, match="Follows writes its parameter 'mean'"),
    ):
        net(torch.randn(2, 4))
