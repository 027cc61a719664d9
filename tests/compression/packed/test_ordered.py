"""Integers in the order of oneDNN's kernels: the same numbers, and one form of them in memory."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_memopt.compression.container import load_compressed, save_compressed
from lightning_memopt.compression.packed import Int8Weight, hardware
from lightning_memopt.compression.packed.ordered import OrderedInt8Weight, _ordered
from lightning_memopt.compression.quantize import module_bytes, quantize
from lightning_memopt.compression.ranges import observe_inputs

pytestmark = pytest.mark.skipif(not hardware.in_bytes(torch.device("cpu")), reason="no AVX2, or torch without oneDNN")


def _linear():
    return nn.Sequential(nn.Linear(128, 192), nn.ReLU(), nn.Linear(192, 128)), torch.randn(5, 7, 128)


def _conv():
    return nn.Sequential(nn.Conv2d(16, 64, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(64, 32, 3, dilation=2)), (
        torch.randn(3, 16, 12, 14)
    )


def _quantized(make, scheme):
    torch.manual_seed(0)
    net, x = make()
    with observe_inputs(net) as ranges:
        net(x)
    quantize(net.eval(), scheme, input_ranges=ranges)
    return net, x


def _weights(net):
    return [part.weight for part in net if hasattr(part, "weight")]


def _plain(net):
    """A copy with integers in their usual order."""
    net = copy.deepcopy(net)
    for part in net:
        if hasattr(part, "weight"):
            part.weight = nn.Parameter(part.weight.plain(), requires_grad=False)
    return net


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_static"])
@pytest.mark.parametrize("make", [_linear, _conv])
def test_products_are_those_of_the_integers_in_their_usual_order(make, scheme):
    net, x = _quantized(make, scheme)
    assert all(type(weight) is OrderedInt8Weight for weight in _weights(net))
    # Of one layer: what goes into the next, rounded, could be a whole step apart for a last bit.
    torch.testing.assert_close(net[0](x), _plain(net)[0](x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [_linear, _conv])
def test_they_take_no_more_memory_than_integers_and_scales_and_two_sums_of_each_output(make):
    net, _ = _quantized(make, "int8_dynamic")
    outputs = sum(len(weight) for weight in _weights(net))
    assert module_bytes(net) <= module_bytes(_plain(net)) + 8 * outputs  # ours, and on some processors oneDNN's


def test_a_weight_that_the_order_of_the_kernels_would_fill_up_keeps_its_usual_one():
    net = nn.Sequential(nn.Linear(1024, 9), nn.Conv2d(20, 500, 3))
    quantize(net, "int8_dynamic")
    numbers = sum(part.weight.numel() for part in net)
    held = module_bytes(net)
    assert numbers < held < 1.15 * numbers + 4 * 2 * 509


def test_what_is_saved_is_in_the_usual_order_and_what_is_loaded_in_that_of_the_kernels(tmp_path):
    net, x = _quantized(_conv, "int8_static")
    save_compressed(net, tmp_path / "net")
    loaded = load_compressed(tmp_path / "net", _conv()[0])
    assert all(type(weight) is OrderedInt8Weight for weight in _weights(loaded))
    assert torch.equal(loaded(x), net(x))
    assert torch.equal(loaded[0].weight.values, net[0].weight.plain().values)


def test_copies_pickles_and_states_give_the_same_and_integers_live_as_long_as_a_weight():
    net, x = _quantized(_linear, "int8_dynamic")
    expected, key = net(x), net[0].weight.key
    assert torch.equal(copy.deepcopy(net)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), expected)
    other, _ = _quantized(lambda: (_linear()[0].requires_grad_(False).apply(_negate), x), "int8_dynamic")
    assert not torch.equal(other(x), expected)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), expected)
    del net
    assert key not in _ordered


def _negate(part):
    if isinstance(part, nn.Linear):
        part.weight.neg_()


def test_moved_elsewhere_the_weight_has_its_usual_order():
    net, _ = _quantized(_linear, "int8_dynamic")
    moved = net[0].weight.to("meta")
    assert type(moved) is Int8Weight and moved.device.type == "meta"


def test_embeddings_and_what_is_tied_to_them_keep_their_rows_in_order():
    net = nn.Sequential(nn.Embedding(128, 96), nn.Linear(96, 128, bias=False))
    net[1].weight = net[0].weight
    quantize(net, "int8_dynamic")
    assert type(net[1].weight) is Int8Weight and net[1].weight is net[0].weight


@pytest.mark.parametrize("make", [_linear, _conv])
def test_the_compiler_follows_it_in_one_graph(make):
    net, x = _quantized(make, "int8_static")
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), net(x))


def test_attention_that_cuts_its_weight_sees_the_numbers_that_it_stands_for():
    attention = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    x, other = torch.randn(2, 5, 64), torch.randn(2, 3, 64)
    expected = attention(x, other, other)[0]
    quantize(attention, "int8_dynamic")
    assert type(attention.in_proj_weight) is OrderedInt8Weight
    torch.testing.assert_close(attention(x, other, other)[0], expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_static"])
def test_a_batch_of_no_rows_gives_none(scheme):
    net, x = _quantized(_linear, scheme)
    assert net(x[:0]).shape == (0, *x.shape[1:])
