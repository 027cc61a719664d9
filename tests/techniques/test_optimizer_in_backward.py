"""Stepping in the backward, in a plain training loop."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lightning_memopt.techniques.optimizer_in_backward import step_in_backward


def _net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def _loss(net: nn.Module, step: int) -> torch.Tensor:
    return net(torch.randn(16, 4, generator=torch.Generator().manual_seed(step))).square().sum()


def _train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[torch.Tensor]:
    for step in range(steps):
        optimizer.zero_grad()
        _loss(net, step).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in net.parameters()]


def _adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.01)


def test_a_plain_loop_gives_the_same_weights_and_no_gradient_outlives_its_step():
    expected = _train(plain := _net(), _adamw(plain))
    net = _net()
    optimizer = _adamw(net)
    most_alive = 0

    def count_alive(_: torch.Tensor) -> None:
        nonlocal most_alive
        most_alive = max(most_alive, sum(p.grad is not None for p in net.parameters()))

    # Registered first, so each sees the gradient before it is used and freed.
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(count_alive)
    handle = step_in_backward(net, [optimizer])
    actual = _train(net, optimizer)
    assert most_alive == 1
    assert all(parameter.grad is None for parameter in net.parameters())
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    handle.remove()


def test_a_module_called_several_times_and_a_tied_weight_are_stepped_once():
    def build() -> tuple[nn.Linear, nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        block, tied = nn.Linear(4, 4), nn.Linear(4, 4)
        tied.weight = block.weight
        return block, tied, torch.optim.SGD([*block.parameters(), tied.bias], lr=0.1)

    def run(in_backward: bool) -> torch.Tensor:
        block, tied, optimizer = build()
        module = nn.ModuleList([block, tied])
        if in_backward:
            step_in_backward(module, [optimizer])
        for _ in range(3):
            optimizer.zero_grad()
            tied(block(block(torch.ones(2, 4)))).square().sum().backward()
            optimizer.step()
        return block.weight.detach()

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


def test_a_parameter_without_a_gradient_in_a_step_is_left_alone_in_it():
    def run(in_backward: bool) -> list[torch.Tensor]:
        net = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        for parameter in net.parameters():
            nn.init.constant_(parameter, 0.5)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
        if in_backward:
            step_in_backward(net, [optimizer])
        for step in range(4):
            optimizer.zero_grad()
            net[step % 2](torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
        return [parameter.detach() for parameter in net.parameters()]

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


def test_unfreezing_a_layer_and_adding_a_group_while_training_works():
    def run(in_backward: bool) -> tuple[list[torch.Tensor], bool]:
        net = _net()
        net[2].requires_grad_(False)
        optimizer = torch.optim.AdamW([*net[0].parameters(), *net[2].parameters()], lr=0.01)
        if in_backward:
            step_in_backward(net, [optimizer])
        for step in range(6):
            if step == 2:
                net[2].requires_grad_(True)
                optimizer.add_param_group({"params": list(net[4].parameters()), "lr": 0.1})
            net.zero_grad()
            _loss(net, step).backward()
            optimizer.step()
        freed = all(parameter.grad is None for parameter in net.parameters())
        return [parameter.detach() for parameter in net.parameters()], freed

    plain, stepped = run(False), run(True)
    torch.testing.assert_close(stepped[0], plain[0], rtol=0, atol=0)
    assert stepped[1]


def test_clipping_by_value_clips_each_gradient_before_its_step():
    plain, net = _net(), _net()
    reference, optimizer = _adamw(plain), _adamw(net)
    step_in_backward(net, [optimizer], clip_value=0.05)
    for step in range(3):
        reference.zero_grad()
        _loss(plain, step).backward()
        nn.utils.clip_grad_value_(plain.parameters(), 0.05)
        reference.step()
        _loss(net, step).backward()
        optimizer.step()
    torch.testing.assert_close(list(net.parameters()), list(plain.parameters()), rtol=0, atol=0)


def test_checkpointed_blocks_recompute_with_the_weights_of_the_forward():
    class Checkpointed(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in (*self, *reversed(self)):
                x = checkpoint(layer, x, use_reentrant=False)
            return x

    def run(in_backward: bool, module: type[nn.Sequential]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = module(*(nn.Linear(4, 4) for _ in range(3)))
        optimizer = _adamw(net)
        if in_backward:
            step_in_backward(net, [optimizer])
        return _train(net, optimizer)

    torch.testing.assert_close(run(True, Checkpointed), run(False, Checkpointed), rtol=0, atol=0)


def test_a_second_gradient_within_one_step_is_refused_by_the_parameters_name():
    net = _net()
    step_in_backward(net, [_adamw(net)])
    _loss(net, 0).backward()
    with pytest.raises(RuntimeError, match=r"'4\.(weight|bias)' got a second gradient before"):
        _loss(net, 1).backward()


def test_a_parameter_in_two_optimizers_is_refused_by_name():
    net = _net()
    with pytest.raises(ValueError, match=r"'2\.weight' is in two optimizers \(AdamW and SGD\)"):
        step_in_backward(net, [_adamw(net), torch.optim.SGD([net[2].weight])])


def test_two_optimizers_with_parameters_of_their_own_work():
    def run(in_backward: bool) -> list[torch.Tensor]:
        net = _net()
        optimizers = [_adamw(net[0]), torch.optim.SGD(net[2:].parameters(), lr=0.01, momentum=0.9)]
        if in_backward:
            step_in_backward(net, optimizers)
        for step in range(4):
            net.zero_grad()
            _loss(net, step).backward()
            for optimizer in optimizers:
                optimizer.step()
        return [parameter.detach() for parameter in net.parameters()]

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


def test_removing_the_handle_leaves_gradients_to_the_optimizer_again():
    net = _net()
    optimizer = _adamw(net)
    handle = step_in_backward(net, [optimizer])
    handle.remove()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    _loss(net, 0).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    torch.testing.assert_close([p.detach() for p in net.parameters()], before, rtol=0, atol=0)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in net.parameters())
    assert not optimizer._optimizer_step_pre_hooks


def test_a_failure_in_mid_backward_leaves_the_optimizer_whole_and_the_next_step_working():
    net = _net()
    optimizer = _adamw(net)
    step_in_backward(net, [optimizer])
    groups = optimizer.param_groups

    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("out of memory")

    hook = net[0].weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        _loss(net, 0).backward()
    hook.remove()
    assert optimizer.param_groups is groups
    optimizer.zero_grad()
    optimizer.step()
    _loss(net, 1).backward()
    assert len(optimizer.state) == len(list(net.parameters()))


def test_sparse_gradients_are_stepped_sparsely():
    def run(in_backward: bool) -> torch.Tensor:
        torch.manual_seed(0)
        table = nn.Embedding(10, 4, sparse=True)
        optimizer = torch.optim.SparseAdam(table.parameters(), lr=0.1)
        if in_backward:
            step_in_backward(table, [optimizer])
        for step in range(3):
            optimizer.zero_grad()
            table(torch.tensor([step, step + 1])).square().sum().backward()
            optimizer.step()
        return table.weight.detach()

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


def test_tensors_without_values_are_stepped_too():
    with FakeTensorMode():
        net = _net()
        optimizer = _adamw(net)
        step_in_backward(net, [optimizer])
        net(torch.ones(2, 4)).sum().backward()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert len(optimizer.state) == len(list(net.parameters()))
