"""Packed state stepped by the kernels of bitsandbytes and torchao, against their own optimizers in a plain loop.

What torchao compiles takes seconds for each kind of optimizer and width, so most of its cases are left to a release.
"""

import copy
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_memopt.techniques import low_bit_engines, low_bit_libraries
from lightning_memopt.techniques.blockwise import as_packed
from lightning_memopt.techniques.low_bit import hold_low_bit_state, state_bytes
from lightning_memopt.techniques.low_bit_engines import SMALLEST
from lightning_memopt.techniques.low_bit_libraries import BitsandbytesEngine
from lightning_memopt.techniques.optimizer_in_backward import step_in_backward

library = pytest.importorskip("bitsandbytes").optim

ADAM = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6}
SGD = {"lr": 0.1, "momentum": 0.8, "weight_decay": 1e-3}
BITSANDBYTES = {
    "adamw": (torch.optim.AdamW, library.AdamW8bit, ADAM | {"weight_decay": 0.1}),
    "adam": (torch.optim.Adam, library.Adam8bit, ADAM),
    "sgd": (torch.optim.SGD, library.SGD8bit, SGD),
}
"""The user's optimizer, the library's, and the hyper-parameters of both."""

Make = Callable[..., torch.optim.Optimizer]


def _net(*widths: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pairs = zip((64, *widths), (*widths, 3), strict=True)
        return nn.Sequential(*(layer for a, b in pairs for layer in (nn.Linear(a, b), nn.Tanh())))


def _train(net: nn.Module, optimizers: Iterable[Any], steps: int = 10, first: int = 0) -> None:
    """``optimizers`` may have learning-rate schedulers among them."""
    for step in range(first, first + steps):
        rows = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
        (net(rows) - rows[:, :3]).square().mean().backward()
        for each in optimizers:
            each.step()
        net.zero_grad()


def _weights(net: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


def _assert_same(net: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(_weights(net), _weights(other), rtol=0, atol=0)


def _groups(net: nn.Sequential, is_wanted: Callable[[nn.Parameter], bool], **first: Any) -> list[dict[str, Any]]:
    """The first layer with hyper-parameters of its own, and the others, each of what is wanted."""
    groups = [{"params": net[0].parameters(), "lr": 0.003, **first}, {"params": net[1:].parameters()}]
    return [{**group, "params": [p for p in group["params"] if is_wanted(p)]} for group in groups]


def _by_hand(
    net: nn.Sequential, kind: Make, theirs: Make, options: dict[str, Any], block: int, **first: Any
) -> list[Any]:
    """The library's own optimizer for what it packs and the user's for the rest, as a plain loop has them."""

    def is_packed(parameter: nn.Parameter) -> bool:
        return parameter.numel() >= SMALLEST and parameter.numel() % block == 0

    packed = theirs(_groups(net, is_packed, **first), **options)
    return [packed, kind(_groups(net, lambda parameter: not is_packed(parameter), **first), **options)]


def _halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_weights_are_those_of_the_optimizer_of_bitsandbytes_with_its_groups_and_a_schedule(name):
    kind, theirs, options = BITSANDBYTES[name]
    expected, net = _net(128, 65), _net(128, 65)  # blocks that are cut short, and biases that stay as they are
    by_hand = _by_hand(expected, kind, theirs, options, block=1, weight_decay=0.0)
    _train(expected, [*by_hand, *map(_halving, by_hand)])
    optimizer = kind(_groups(net, lambda _: True, weight_decay=0.0), **options)
    hold_low_bit_state(net, optimizer, 8, "bitsandbytes")
    _train(net, [optimizer, _halving(optimizer)])
    _assert_same(net, expected)
    assert as_packed(optimizer.state[net[2].weight]["momentum_buffer" if name == "sgd" else "exp_avg"])


def test_the_weight_decay_of_adam_is_part_of_the_gradient_as_it_is_for_torch():
    expected, net, decoupled = _net(128), _net(128), _net(128)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=0.1)
    hold_low_bit_state(net, optimizer, 8, "bitsandbytes")
    _train(net, [optimizer])
    _train(expected, [torch.optim.Adam(expected.parameters(), lr=1e-2, weight_decay=0.1)])
    _train(decoupled, [library.Adam8bit(decoupled.parameters(), lr=1e-2, weight_decay=0.1)])
    ours, theirs = ((each[0].weight - expected[0].weight).abs().mean() for each in (net, decoupled))
    assert ours < 0.1 * theirs


@pytest.mark.parametrize(
    ("bits", "kind", "class_name"),
    [
        (8, torch.optim.AdamW, "AdamW8bit"),
        pytest.param(8, torch.optim.Adam, "Adam8bit", marks=pytest.mark.slow),
        pytest.param(4, torch.optim.AdamW, "AdamW4bit", marks=pytest.mark.slow),
        pytest.param("fp8", torch.optim.AdamW, "AdamWFp8", marks=pytest.mark.slow),
    ],
)
def test_weights_are_those_of_the_optimizer_of_torchao_with_its_groups_and_a_schedule(bits, kind, class_name):
    theirs = getattr(pytest.importorskip("torchao.optim"), class_name)
    options = ADAM | {"weight_decay": 0.1}
    expected, net = _net(64, 64, 65), _net(64, 64, 65)
    # Each weight decay is compiled, so the quick case has one.
    first = {} if class_name == "AdamW8bit" else {"weight_decay": 0.0}
    by_hand = _by_hand(expected, kind, theirs, options, block=128 if bits == 4 else 256, **first)
    # Its rate is a tensor, which a schedule fills; the product of float32 is what it is of the plain one.
    _train(expected, [*by_hand, *map(_halving, by_hand)])
    optimizer = kind(_groups(net, lambda _: True, **first), **options)
    hold_low_bit_state(net, optimizer, bits, "torchao")
    _train(net, [optimizer, _halving(optimizer)])
    _assert_same(net, expected)
    assert as_packed(optimizer.state[net[2].weight]["exp_avg"])
    assert as_packed(optimizer.state[net[4].weight]["exp_avg"]) is None  # no whole number of blocks


ENGINES = [("bitsandbytes", 8), *(pytest.param("torchao", bits, marks=pytest.mark.slow) for bits in (8, 4, "fp8"))]


@pytest.mark.parametrize(("engine", "bits"), ENGINES)
def test_training_follows_that_with_fp32_state(engine, bits):
    losses = []
    for held in (False, True):
        net = _net(128)
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
        if held:
            hold_low_bit_state(net, optimizer, bits, engine)
        _train(net, [optimizer], 100)
        rows = torch.randn(512, 64, generator=torch.Generator().manual_seed(-1))
        losses.append((net(rows) - rows[:, :3]).square().mean().item())
    assert losses[1] == pytest.approx(losses[0], rel=0.3 if bits == 4 else 0.05)


@pytest.mark.parametrize(("engine", "bits"), ENGINES)
def test_saving_and_loading_resumes_bit_for_bit(engine, bits, tmp_path):
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        net = _net(64, 64)
        optimizer = torch.optim.AdamW(net.parameters(), **ADAM)
        hold_low_bit_state(net, optimizer, bits, engine)
        return net, optimizer

    whole, optimizer = start()
    _train(whole, [optimizer], 5)
    torch.save((whole.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    _train(whole, [optimizer], 5, first=5)
    net, resumed = start()
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    net.load_state_dict(weights)
    resumed.load_state_dict(state)
    _train(net, [resumed], 5, first=5)
    _assert_same(net, whole)


@pytest.mark.parametrize(("engine", "bits"), ENGINES)
def test_what_is_unpacked_at_the_end_is_packed_again_to_what_it_was(engine, bits):
    net = _net(64, 64)
    optimizer = torch.optim.AdamW(net.parameters(), **ADAM)
    handle = hold_low_bit_state(net, optimizer, bits, engine)
    _train(net, [optimizer], 5)
    handle.remove()
    assert optimizer.state[net[0].weight]["exp_avg"].shape == net[0].weight.shape
    again, uninterrupted = copy.deepcopy(net), _net(64, 64)
    resumed = torch.optim.AdamW(again.parameters(), **ADAM)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    hold_low_bit_state(again, resumed, bits, engine)
    _train(again, [resumed], 5, first=5)
    other = torch.optim.AdamW(uninterrupted.parameters(), **ADAM)
    hold_low_bit_state(uninterrupted, other, bits, engine)
    _train(uninterrupted, [other], 10)
    _assert_same(again, uninterrupted)


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        (None, ("bitsandbytes", 8)),
        (("memopt", 4), ("bitsandbytes", 8)),
        (("bitsandbytes", 8), ("memopt", 8)),
        pytest.param(("bitsandbytes", 8), ("torchao", 8), marks=pytest.mark.slow),
        pytest.param(("memopt", 8), ("torchao", "fp8"), marks=pytest.mark.slow),
        pytest.param(("torchao", "fp8"), ("bitsandbytes", 8), marks=pytest.mark.slow),
    ],
)
def test_state_of_another_engine_is_converted_when_loaded(source, destination):
    net = _net(64, 65)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    if source:
        hold_low_bit_state(net, optimizer, source[1], source[0])
    _train(net, [optimizer])
    other = copy.deepcopy(net)
    loaded = torch.optim.AdamW(other.parameters(), lr=1e-2)
    hold_low_bit_state(other, loaded, destination[1], destination[0])
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    wanted = low_bit_engines.FORMATS[destination[0]][destination[1]]
    assert as_packed(loaded.state[other[0].weight]["exp_avg"])["format"] == wanted
    assert loaded.state[other[0].weight]["step"] == 10
    before = _weights(net)
    _train(net, [optimizer], 5, first=10)
    _train(other, [loaded], 5, first=10)
    moved, apart = (
        torch.cat([(a - b).flatten() for a, b in zip(_weights(net), weights, strict=True)]).norm()
        for weights in (before, _weights(other))
    )
    assert apart < 0.25 * moved


@pytest.mark.parametrize(
    ("engine", "bits", "most"),
    [
        ("bitsandbytes", 8, 0.255),
        pytest.param("torchao", 8, 0.255, marks=pytest.mark.slow),
        pytest.param("torchao", "fp8", 0.255, marks=pytest.mark.slow),
        pytest.param("torchao", 4, 0.134, marks=pytest.mark.slow),
    ],
)
def test_state_takes_the_bytes_that_the_default_engine_takes(engine, bits, most):
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer = torch.optim.AdamW([weight])
    hold_low_bit_state(nn.ParameterList([weight]), optimizer, bits, engine)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert state_bytes(optimizer) <= most * 2 * weight.nbytes + 4  # and the number of the step


def test_small_parameters_are_stepped_bit_for_bit_as_without():
    plain, net = _net(32), _net(32)
    reference, optimizer = (torch.optim.AdamW(each.parameters(), **ADAM) for each in (plain, net))
    hold_low_bit_state(net, optimizer, 8, "bitsandbytes")
    _train(plain, [reference])
    _train(net, [optimizer])
    _assert_same(net, plain)
    torch.testing.assert_close(optimizer.state_dict(), reference.state_dict(), rtol=0, atol=0)


def test_pieces_of_a_parameter_give_what_the_whole_gives(monkeypatch):
    nets = []
    for piece in (512, 2**18):
        monkeypatch.setitem(low_bit_engines.PIECE, "cpu", piece)
        nets.append(_net(65))
        optimizer = torch.optim.AdamW(nets[-1].parameters(), **ADAM)
        hold_low_bit_state(nets[-1], optimizer, 8, "bitsandbytes")
        _train(nets[-1], [optimizer])
    _assert_same(*nets)


def test_stepping_in_the_backward_gives_the_same_weights():
    nets = []
    for in_backward in (False, True):
        nets.append(_net(128))
        optimizer = torch.optim.AdamW(nets[-1].parameters(), **ADAM)
        hold_low_bit_state(nets[-1], optimizer, 8, "bitsandbytes")
        if in_backward:
            step_in_backward(nets[-1], [optimizer])
        _train(nets[-1], [optimizer])
    _assert_same(*nets)


def test_a_weight_that_is_not_contiguous_is_stepped_in_place():
    weight = nn.Parameter(torch.randn(16, 16, 4, 8).to(memory_format=torch.channels_last))
    plain = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    for parameter in (weight, plain):
        optimizer = torch.optim.AdamW([parameter], lr=0.1)
        hold_low_bit_state(nn.ParameterList([parameter]), optimizer, 8, "bitsandbytes")
        for step in range(3):
            gradient = torch.arange(8192.0).view(plain.shape) + step
            parameter.grad = gradient.to(memory_format=torch.channels_last) if parameter is weight else gradient
            optimizer.step()
    torch.testing.assert_close(weight, plain, rtol=0, atol=0)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_the_handle_leaves_nothing_on_the_optimizer():
    net = _net(128)
    optimizer = torch.optim.AdamW(net.parameters(), **ADAM)
    before, weights = set(vars(optimizer)), _weights(net)
    handle = hold_low_bit_state(net, optimizer, 8, "bitsandbytes")
    assert not optimizer.state  # the kernel was tried on something else
    torch.testing.assert_close(_weights(net), weights, rtol=0, atol=0)
    _train(net, [optimizer])
    handle.remove()
    assert set(vars(optimizer)) == before
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    _train(net, [optimizer])


def test_tensors_without_values_take_the_same_bytes_of_state():
    def run() -> int:
        net = nn.Linear(100, 100)
        optimizer = torch.optim.AdamW(net.parameters())
        hold_low_bit_state(net, optimizer, 8, "bitsandbytes")
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.ones(2, 100)).sum().backward()
            optimizer.step()
        return state_bytes(optimizer)

    with FakeTensorMode():
        fake = run()
    assert fake == run()


def _adamw(**options: Any) -> Make:
    return lambda parameters: torch.optim.AdamW(parameters, **options)


def _sgd(**options: Any) -> Make:
    return lambda parameters: torch.optim.SGD(parameters, lr=0.1, **options)


REFUSALS = {
    "maximize": (_adamw(maximize=True), "Group 0 of AdamW has maximize=True, which the kernels of {engine}"),
    "differentiable": (_adamw(differentiable=True), "Group 0 of AdamW has differentiable=True"),
    "capturable": (_adamw(capturable=True), "Group 0 of AdamW has capturable=True"),
    "fused": (_adamw(fused=True), "AdamW has fused=True"),
    "amsgrad": (_adamw(amsgrad=True), "Group 0 of AdamW has amsgrad=True"),
    "nesterov": (_sgd(momentum=0.9, nesterov=True), "has nesterov=True|torchao has Adam and AdamW alone"),
    "dampening": (_sgd(momentum=0.9, dampening=0.1), "has dampening=0.1|torchao has Adam and AdamW alone"),
    "no momentum": (_sgd(), "Group 0 of SGD has momentum=0"),
    "RMSprop": (torch.optim.RMSprop, "is RMSprop"),
}


@pytest.mark.parametrize("engine", ["bitsandbytes", "torchao"])
@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_kernels_do_not_have_is_refused_by_name(case, engine):
    make, message = REFUSALS[case]
    net = _net(128)
    with pytest.raises(ValueError, match=message.format(engine=engine)):
        hold_low_bit_state(net, make(net.parameters()), 8, engine)


def test_an_option_that_comes_with_a_checkpoint_is_refused_too():
    net = _net(128)
    saved = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    hold_low_bit_state(net, optimizer, 8, "bitsandbytes")
    with pytest.raises(ValueError, match="Group 0 of SGD has nesterov=True"):
        optimizer.load_state_dict(saved.state_dict())


def test_parameters_that_the_kernels_cannot_step_are_refused_by_name():
    net = nn.ModuleDict({"table": nn.Linear(64, 64, dtype=torch.float64)})
    with pytest.raises(ValueError, match=r"'table.weight' is float64.*default engine"):
        hold_low_bit_state(net, torch.optim.AdamW(net.parameters()), 8, "bitsandbytes")


def test_a_device_that_the_library_has_no_kernels_for_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(low_bit_libraries, "_BITSANDBYTES_DEVICES", ("cuda",))
    net = nn.ModuleDict({"table": nn.Linear(64, 64)})
    with pytest.raises(ValueError, match=r"'table.weight' is on cpu, .* for cuda alone.*default engine"):
        hold_low_bit_state(net, torch.optim.AdamW(net.parameters()), 8, "bitsandbytes")


def test_parameters_of_other_stages_which_have_no_memory_here_are_left_alone():
    net = nn.Sequential(nn.Linear(64, 64, device="meta"), nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(net.parameters())
    hold_low_bit_state(net, optimizer, 8, "bitsandbytes")
    net[1](torch.ones(2, 64)).sum().backward()
    optimizer.step()
    assert optimizer.state.keys() == {net[1].weight, net[1].bias}


def test_a_kernel_that_does_not_run_here_is_named_before_the_first_step(monkeypatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("no kernel for this device\nand a long trace")

    monkeypatch.setattr(BitsandbytesEngine, "step", fail)
    net = _net(128)
    message = (
        r"bitsandbytes cannot step a parameter on cpu in torch.float32 \(RuntimeError: no kernel for this device\)"
    )
    with pytest.raises(ValueError, match=f"{message}.*default engine"):
        hold_low_bit_state(net, torch.optim.AdamW(net.parameters()), 8, "bitsandbytes")


@pytest.mark.parametrize("engine", ["bitsandbytes", "torchao"])
def test_a_missing_library_is_named_with_what_installs_it(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, engine, None)
    net = _net(128)
    with pytest.raises(ModuleNotFoundError, match=rf"{engine}.*pip install 'lightning-memopt\[quantize\]'"):
        hold_low_bit_state(net, torch.optim.AdamW(net.parameters()), 8, engine)


@pytest.mark.parametrize(
    ("engine", "bits", "message"),
    [
        ("bitsandbytes", 4, r"bits=4 is no width that engine='bitsandbytes' .* possible are 8\."),
        ("torchao", 16, "bits=16 .*engine='torchao' .* possible are 8, 4 and 'fp8'"),
        ("apex", 8, "engine='apex' is unknown; possible are 'memopt', 'bitsandbytes', 'torchao'"),
    ],
)
def test_unknown_engines_and_widths_that_they_do_not_have_are_refused_with_the_possible_ones(engine, bits, message):
    net = _net(128)
    with pytest.raises(ValueError, match=message):
        hold_low_bit_state(net, torch.optim.AdamW(net.parameters()), bits, engine)
