"""Optimizer state in few bits, in a plain training loop."""

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_memopt.techniques import low_bit_engines
from lightning_memopt.techniques.blockwise import as_packed
from lightning_memopt.techniques.low_bit import SMALLEST, hold_low_bit_state, state_bytes
from lightning_memopt.techniques.optimizer_in_backward import step_in_backward

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=2e-3, weight_decay=1e-4, betas=(0.8, 0.99)),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
}

LOSS_TOLERANCE = {8: 0.03, "fp8": 0.05, 4: 0.3}
"""Relative difference allowed between the last losses on the digits with and without low-bit state."""


def _net(width: int = 128) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def _train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    images, labels = _digits()
    losses = []
    for step in range(first, first + steps):
        rows = torch.randint(0, 1500, (64,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(net(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _weights(net: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


@pytest.mark.parametrize("bits", LOSS_TOLERANCE)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_digits_are_learnt_as_with_fp32_state(name, bits):
    plain, net = _net(), _net()
    expected = _train(plain, OPTIMIZERS[name](plain.parameters()), 200)[-20:]
    optimizer = OPTIMIZERS[name](net.parameters())
    hold_low_bit_state(net, optimizer, bits)
    actual = _train(net, optimizer, 200)[-20:]
    assert sum(actual) == pytest.approx(sum(expected), rel=LOSS_TOLERANCE[bits])


@pytest.mark.parametrize(("bits", "most"), [(8, 0.27), ("fp8", 0.27), (4, 0.15)])
def test_state_takes_a_fraction_of_the_bytes_of_fp32(bits, most):
    plain, net = _net(width=512), _net(width=512)
    reference, optimizer = (torch.optim.AdamW(module.parameters()) for module in (plain, net))
    handle = hold_low_bit_state(net, optimizer, bits)
    _train(plain, reference, 2)
    _train(net, optimizer, 2)
    assert state_bytes(optimizer) <= most * state_bytes(reference)
    handle.remove()
    assert state_bytes(optimizer) == state_bytes(reference)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_below_the_smallest_size_are_stepped_bit_for_bit_as_without(name):
    plain, net = _net(width=32), _net(width=32)
    assert max(parameter.numel() for parameter in net.parameters()) < SMALLEST
    reference, optimizer = (OPTIMIZERS[name](module.parameters()) for module in (plain, net))
    hold_low_bit_state(net, optimizer)
    _train(plain, reference, 20)
    _train(net, optimizer, 20)
    torch.testing.assert_close(_weights(net), _weights(plain), rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict(), reference.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_step_is_exact_since_nothing_was_rounded_before_it(name):
    plain, net = _net(), _net()
    reference, optimizer = (OPTIMIZERS[name](module.parameters()) for module in (plain, net))
    hold_low_bit_state(net, optimizer)
    _train(plain, reference, 1)
    _train(net, optimizer, 1)
    torch.testing.assert_close(_weights(net), _weights(plain), rtol=0, atol=0)


def test_stepping_in_pieces_gives_what_stepping_whole_gives(monkeypatch):
    results = []
    for piece in (512, 2**18):
        monkeypatch.setitem(low_bit_engines.PIECE, "cpu", piece)
        net = _net()
        optimizer = OPTIMIZERS["adamw"](net.parameters())
        hold_low_bit_state(net, optimizer)
        _train(net, optimizer, 10)
        packed = as_packed(optimizer.state[net[2].weight]["exp_avg_sq"])
        results.append([*_weights(net), packed["codes"], packed["scales"]])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_hyper_parameters_are_those_of_each_group_at_each_step():
    plain, net = _net(), _net()

    def build(module):
        groups = [{"params": module[0].parameters(), "lr": 0.0}, {"params": module[2:].parameters()}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)

    optimizer, scheduler = build(net)
    hold_low_bit_state(net, optimizer)
    _train(net, optimizer, 1)
    scheduler.step()
    after_one = _weights(net)
    _train(net, optimizer, 3)
    torch.testing.assert_close(_weights(net), after_one, rtol=0, atol=0)
    torch.testing.assert_close(net[0].weight, plain[0].weight, rtol=0, atol=0)
    assert not torch.equal(net[2].weight, plain[2].weight)


def test_step_hooks_run_once_around_the_step_and_gradients_are_there_after_it():
    net = _net()
    optimizer = torch.optim.AdamW(net.parameters())
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    hold_low_bit_state(net, optimizer)
    _train(net, optimizer, 1)
    assert calls == ["pre", "post"]
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_closure_is_called_once_and_its_loss_returned():
    net = _net()
    optimizer = torch.optim.AdamW(net.parameters())
    hold_low_bit_state(net, optimizer)
    before = _weights(net)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        net(torch.ones(2, 64)).sum().backward()
        return 7.0

    assert optimizer.step(closure) == 7.0
    assert calls == [True]
    assert not any(torch.equal(a, b) for a, b in zip(_weights(net), before, strict=True))


def test_stepping_in_the_backward_gives_the_same_weights():
    results = []
    for in_backward in (False, True):
        net = _net()
        optimizer = OPTIMIZERS["adamw"](net.parameters())
        hold_low_bit_state(net, optimizer)
        if in_backward:
            step_in_backward(net, [optimizer])
        _train(net, optimizer, 10)
        results.append(_weights(net))
        assert as_packed(optimizer.state[net[2].weight]["exp_avg"])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("bits", [8, 4, "fp8"])
def test_saving_and_loading_packed_state_resumes_bit_for_bit(bits, tmp_path):
    whole = _net()
    optimizer = OPTIMIZERS["adamw"](whole.parameters())
    hold_low_bit_state(whole, optimizer, bits)
    _train(whole, optimizer, 10)
    torch.save((whole.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    _train(whole, optimizer, 10, first=10)

    net = _net()
    resumed = OPTIMIZERS["adamw"](net.parameters())
    hold_low_bit_state(net, resumed, bits)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    net.load_state_dict(weights)
    resumed.load_state_dict(state)
    _train(net, resumed, 10, first=10)
    torch.testing.assert_close(_weights(net), _weights(whole), rtol=0, atol=0)


@pytest.mark.parametrize("source_bits", [None, 4])
def test_state_of_other_widths_is_converted_when_loaded(source_bits):
    source = _net()
    saved = OPTIMIZERS["adamw"](source.parameters())
    if source_bits:
        hold_low_bit_state(source, saved, source_bits)
    _train(source, saved, 10)
    net = copy.deepcopy(source)
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    hold_low_bit_state(net, optimizer, 8)
    optimizer.load_state_dict(saved.state_dict())
    packed = as_packed(optimizer.state[net[2].weight]["exp_avg"])
    assert packed["format"] == "8-bit"
    assert packed["codes"].dtype == torch.uint8
    continued, expected = _train(net, optimizer, 10, first=10), _train(source, saved, 10, first=10)
    assert sum(continued) == pytest.approx(sum(expected), rel=0.05)


def test_an_optimizer_that_already_has_state_is_taken_over():
    plain = _net()
    reference = OPTIMIZERS["adamw"](plain.parameters())
    _train(plain, reference, 10)
    net = copy.deepcopy(plain)
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    hold_low_bit_state(net, optimizer)
    assert state_bytes(optimizer) < 0.35 * state_bytes(reference)
    assert sum(_train(net, optimizer, 10, 10)) == pytest.approx(sum(_train(plain, reference, 10, 10)), rel=0.01)


def test_removing_the_handle_leaves_a_plain_optimizer_that_goes_on():
    plain, net = _net(), _net()
    reference, optimizer = (OPTIMIZERS["adamw"](module.parameters()) for module in (plain, net))
    patched = set(vars(optimizer))
    handle = hold_low_bit_state(net, optimizer)
    _train(plain, reference, 10)
    _train(net, optimizer, 10)
    handle.remove()
    assert set(vars(optimizer)) == patched
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert optimizer.state[net[2].weight]["exp_avg"].shape == net[2].weight.shape
    assert sum(_train(net, optimizer, 10, 10)) == pytest.approx(sum(_train(plain, reference, 10, 10)), rel=0.05)


def test_a_weight_that_is_not_contiguous_is_stepped_in_place():
    weight = nn.Parameter(torch.randn(16, 16, 4, 8).to(memory_format=torch.channels_last))
    plain = nn.Parameter(weight.detach().clone().contiguous())
    for parameter in (weight, plain):
        holder = nn.ParameterList([parameter])
        optimizer = torch.optim.AdamW(holder.parameters(), lr=0.1)
        hold_low_bit_state(holder, optimizer)
        for step in range(3):
            parameter.grad = torch.sin(
                plain.detach().clone() * 0 + torch.arange(plain.numel()).view(plain.shape) + step
            )
            optimizer.step()
    torch.testing.assert_close(weight, plain, rtol=0, atol=0)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_elements_with_tiny_gradients_beside_large_ones_do_not_blow_up():
    weight = nn.Parameter(torch.zeros(4096))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0)
    hold_low_bit_state(nn.ParameterList([weight]), optimizer)
    for step in range(50):
        weight.grad = torch.full((4096,), 1e-5)
        weight.grad[::256] = 1.0
        weight.grad[1::2] *= step % 2  # on and off: the first moment outlives the gradient
        optimizer.step()
    assert weight.abs().max() < 1e-3 * 50 * 2


def test_tensors_without_values_take_the_same_bytes_of_state():
    def run() -> int:
        net = nn.Linear(100, 100)
        optimizer = torch.optim.AdamW(net.parameters())
        hold_low_bit_state(net, optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.ones(2, 100)).sum().backward()
            optimizer.step()
        return state_bytes(optimizer)

    with FakeTensorMode():
        fake = run()
    assert fake == run()


class _OwnStep(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


class _OwnDefaults(torch.optim.AdamW):
    pass


REFUSALS = {
    "RMSprop": (lambda p: torch.optim.RMSprop(p), r"is RMSprop, .* Possible are AdamW, Adam, SGD"),
    "own step": (_OwnStep, "is _OwnStep, based on AdamW with a step of its own"),
    "amsgrad": (lambda p: torch.optim.AdamW(p, amsgrad=True), "Group 0 of AdamW has amsgrad=True"),
    "no momentum": (lambda p: torch.optim.SGD(p, lr=0.1), "Group 0 of SGD has momentum=0"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_optimizers_whose_state_cannot_be_packed_are_refused_by_name(case):
    make, message = REFUSALS[case]
    net = _net()
    with pytest.raises(ValueError, match=message):
        hold_low_bit_state(net, make(net.parameters()))


def test_a_subclass_that_steps_as_its_base_is_served():
    net = _net()
    optimizer = _OwnDefaults(net.parameters())
    hold_low_bit_state(net, optimizer)
    _train(net, optimizer, 1)
    assert as_packed(optimizer.state[net[0].weight]["exp_avg"]) is not None


def test_complex_parameters_that_would_be_packed_are_refused_by_name():
    net = nn.ParameterDict(
        {"small": torch.zeros(8, dtype=torch.cfloat), "large": torch.zeros(SMALLEST, dtype=torch.cfloat)}
    )
    with pytest.raises(ValueError, match=r"'large' is complex \(torch.complex64\)"):
        hold_low_bit_state(net, torch.optim.AdamW(net.parameters()))


@pytest.mark.parametrize("bits", [16, 1, True, "int8", 8.5])
def test_unknown_widths_are_refused_with_the_possible_ones(bits):
    net = _net()
    with pytest.raises(ValueError, match=r"possible are 8, 4 and 'fp8'"):
        hold_low_bit_state(net, torch.optim.AdamW(net.parameters()), bits)


def test_sparse_embeddings_are_refused_by_name():
    net = nn.ModuleDict({"table": nn.Embedding(100, 64, sparse=True)})
    with pytest.raises(ValueError, match="'table' has sparse=True"):
        hold_low_bit_state(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
