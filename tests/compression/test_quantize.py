"""Quantizing modules: what is packed, what is skipped and why, what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_memopt.compression.clustering import cluster_weights
from lightning_memopt.compression.container import load_compressed, save_compressed
from lightning_memopt.compression.masks import prune_weights
from lightning_memopt.compression.packed import Int8Weight, PackedWeight, hardware
from lightning_memopt.compression.quantize import module_bytes, quantize
from lightning_memopt.compression.ranges import observe_inputs
from lightning_memopt.compression.selection import WeightFilter
from tests.zoo import ZOO, cases
from tests.zoo.architectures import ARCHITECTURES

SCHEMES = {
    "int8": 0.27,
    "int8_dynamic": 0.27,
    "int4_weight_only": 0.17,
    "nf4": 0.16,
    "fp16": 0.51,
    "bf16": 0.51,
    "fp8": 0.27,
}
"""The largest part of fp32's bytes that a module of large linear layers has."""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_large_linear_layers_take_as_many_bits_as_the_scheme_says(scheme):
    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    done = quantize(net, scheme)
    assert done.packed == ["0.weight", "2.weight"]
    assert set(done.skipped) == {"0.bias", "2.bias"}
    assert done.bytes_after == module_bytes(net) < SCHEMES[scheme] * done.bytes_before


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", cases(without=["gan", "late_mlp"]))
def test_every_module_of_the_zoo_computes_nearly_the_same_loss_in_fewer_bytes(name, scheme):
    entry = ZOO[name]
    module, batch = entry.build().eval(), entry.batch()
    module.log = module.log_dict = lambda *_, **__: None
    expected = module.training_step(batch, 0)
    quantized = copy.deepcopy(module)
    done = quantize(quantized, scheme)
    actual = quantized.training_step(batch, 0)
    expected, actual = (float(x["loss"] if isinstance(x, dict) else x) for x in (expected, actual))
    assert actual == pytest.approx(expected, rel={"fp8": 0.02}.get(scheme, 0.08 if "4" in scheme else 0.005))
    assert done.bytes_after < done.bytes_before


def test_the_head_of_gpt2_stays_tied_and_its_conv1d_layers_are_packed():
    module = ZOO["gpt2"].build()
    done = quantize(module, "int8")
    model = module.model
    assert model.lm_head.weight is model.transformer.wte.weight
    assert type(model.lm_head.weight) is Int8Weight
    assert "model.transformer.h.0.attn.c_attn.weight" in done.packed
    assert {"model.lm_head.weight", "model.transformer.wte.weight"} <= set(done.packed)
    assert done.bytes_after < 0.4 * done.bytes_before


def test_recurrent_layers_are_skipped_by_name_with_the_reason():
    module = ZOO["lstm"].build()
    done = quantize(module, "int8")
    assert "fused kernel of LSTM" in done.skipped["lstm.weight_ih_l0"]
    assert not isinstance(module.lstm.weight_ih_l0, PackedWeight)


def test_weights_that_would_not_become_smaller_stay_and_say_so():
    net = nn.Sequential(nn.Linear(1, 64), nn.Linear(64, 64))
    done = quantize(net, "int8")
    assert done.skipped["0.weight"] == "would take 320 bytes instead of 256"
    assert done.packed == ["1.weight"]


def test_clusters_stay_clusters_in_8_bits_however_small_the_weight_is():
    net = nn.Sequential(nn.Linear(16, 48), nn.Linear(48, 8))
    cluster_weights(net, 8)
    quantize(net, "int8")
    for layer in net:
        assert layer.weight.scale.numel() == 1 and len(layer.weight.values.unique()) <= 8


@pytest.mark.parametrize("share", [0.5, 0.9, 0.95])
def test_a_weight_of_which_few_elements_are_left_is_no_clustered_one_and_keeps_a_scale_for_each_output(share):
    net = nn.Sequential(nn.Linear(64, 32))
    prune_weights(net, share)
    quantize(net, "int8")
    assert net[0].weight.scale.shape == (32, 1)


def test_a_module_that_would_grow_is_refused():
    with pytest.raises(ValueError, match="nothing in it becomes smaller"):
        quantize(nn.Sequential(nn.Linear(1, 64)), "int8")


def test_include_and_exclude_say_which():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    assert quantize(net, "int8", WeightFilter(include=["0", "1"], exclude="1")).packed == ["0.weight"]


def test_quantizing_twice_leaves_what_is_packed():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantize(net, "int8", WeightFilter(include="0"))
    first = net[0].weight
    assert quantize(net, "bf16").packed == ["1.weight"]
    assert net[0].weight is first


def test_static_ranges_make_the_product_of_integers_and_inputs_beyond_them_are_cut():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(32, 64)
    expected = net(x)
    with observe_inputs(net) as ranges:
        net(x)
    assert ranges == {"0": (float(x.min()), float(x.max()))}
    quantize(net, "int8_static", input_ranges=ranges)
    assert (net(x) - expected).norm() < 0.02 * expected.norm()
    assert torch.equal(net(100 * x.abs() + 10), net(torch.full_like(x, float(x.abs().max()))))


@pytest.mark.parametrize("bad_comes_first", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_ranges_are_of_the_finite_inputs_in_whatever_order_they_come(bad, bad_comes_first):
    net, good = nn.Sequential(nn.Linear(128, 128)), torch.linspace(-2, 3, 128)[None]
    spoiled = torch.where(torch.arange(128) == 5, bad, good)
    with observe_inputs(net) as ranges:
        for inputs in (spoiled, good) if bad_comes_first else (good, spoiled, torch.full((1, 128), bad)):
            net(inputs)
    assert ranges == {"0": (-2.0, 3.0)}


@pytest.mark.parametrize("scheme", ["int8", "int4_weight_only", "nf4", "fp16", "bf16", "fp8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_with_elements_that_are_no_numbers_is_left_with_a_warning_and_the_rest_is_packed(scheme, bad):
    net = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    net[0].weight.data[3, 5] = bad
    with pytest.warns(UserWarning, match=r"'0.weight' has elements that are NaN or infinite"):
        done = quantize(net, scheme)
    assert done.packed == ["1.weight"] and "NaN" in done.skipped["0.weight"]
    assert net[0].weight.isfinite().sum() == 128 * 128 - 1


def test_where_calibration_did_not_reach_or_a_convolution_rounds_no_inputs_the_fallback_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 64, 3)
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
            self.head, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            x = self.body(self.stem(x)).flatten(2).mT
            return self.head(self.attention(x, x, x)[0])

    net = Net().eval()
    with observe_inputs(net) as ranges, torch.no_grad():
        net(torch.randn(2, 1, 8, 8))
    fallbacks = quantize(net, "int8_static", input_ranges=ranges).fallbacks
    rows = "each row of inputs is measured, as with int8_dynamic, since calibration saw none"
    assert fallbacks.pop("stem.weight").startswith("inputs are not rounded")
    assert fallbacks == {"attention.out_proj.weight": rows, "unused.weight": rows}
    assert net.attention.out_proj.weight.inputs == net.unused.weight.inputs == "dynamic"
    assert set(quantize(Net(), "int8_dynamic").fallbacks) == {"stem.weight"}
    assert not quantize(Net(), "int8").fallbacks


def test_calibration_sees_what_is_compiled():
    net, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.randn(8, 64)
    in_place = copy.deepcopy(net)
    in_place.compile(backend="aot_eager")
    for compiled in (torch.compile(net, backend="aot_eager"), in_place):
        with torch.no_grad():
            compiled(x)
        with observe_inputs(compiled) as ranges, torch.no_grad():
            compiled(x)
        assert list(ranges.values()) == [(float(x.min()), float(x.max()))]
    torch._dynamo.reset()


def test_schemes_that_there_are_not_are_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="possible are 'int8'"):
        quantize(nn.Linear(64, 64), "int3")


def test_packed_modules_give_no_gradients_to_their_weights_and_pass_them_on_to_inputs():
    net, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(4, 64, requires_grad=True)
    net(x).sum().backward()
    expected, x.grad = x.grad.clone(), None
    quantize(net, "int8")
    net(x).sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=0.05, atol=0.05)
    assert net[0].weight.grad is None and net[0].bias.grad is not None


class TiedHead(nn.Module):
    """An embedding's weight in a head, where it is not in the order of kernels."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(200, 64), nn.Linear(64, 200, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(x)


@pytest.mark.parametrize(
    ("make", "layer", "shape"),
    [
        (lambda: nn.Sequential(nn.Conv2d(16, 16, 3)), "0", (8, 16, 12, 12)),
        (lambda: nn.Sequential(nn.Conv2d(12, 65, 5)), "0", (8, 12, 12, 12)),
        (TiedHead, "head", (64, 64)),
        (lambda: nn.Sequential(nn.Linear(64, 200)), "0", (64, 64)),
    ],
    ids=["small_filters", "odd_filters", "tied_head", "linear"],
)
def test_sums_of_static_inputs_of_one_sign_do_not_overflow(make, layer, shape):
    module, x = make(), torch.rand(shape)
    with torch.no_grad():  # nearly all as large as an integer gets
        weight = next(module.parameters())
        weight.copy_(0.1 + 0.001 * torch.randn_like(weight))
    expected = module(x)
    quantize(module, "int8_static", input_ranges={layer: (0.0, 1.0)})
    torch.testing.assert_close(module(x), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("scheme", ["int8_static", "nf4"])
def test_experts_in_one_parameter_are_packed_however_their_products_are_computed(implementation, scheme):
    entry = ARCHITECTURES["mixtral"]
    module, batch = entry.build().eval(), entry.batch(2)
    module.model.set_experts_implementation(implementation)
    done = quantize(module, scheme)
    dense = entry.build().eval()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        dense.get_parameter(name).data = parameter.dequantize() if isinstance(parameter, PackedWeight) else parameter
    name = "model.model.layers.0.mlp.experts.down_proj"
    assert name in done.packed and (name in done.fallbacks) == (scheme == "int8_static")
    assert done.bytes_after < 0.3 * done.bytes_before
    with torch.no_grad():
        logits, expected = (each.model(**batch).logits for each in (module, dense))
    assert (logits - expected).norm() < 0.03 * expected.norm()


def test_experts_stored_inputs_by_outputs_have_a_scale_for_each_output():
    module = nn.Module()
    module.num_experts, module.is_transposed = 2, True
    module.down_proj = nn.Parameter(torch.randn(2, 64, 16))
    quantize(module, "int8")
    assert module.down_proj.scale.shape == (2, 1, 16)


_SCHEMES = ["int8", "int8_dynamic", "int8_static", "int4_weight_only", "nf4", "fp16", "bf16", "fp8"]
_CLOSE = {"int8_dynamic": 0.04, "int8_static": 0.06, "bf16": 0.02}
"""How far, as a part of their size, outputs may be from those of the dense weights; where only weights are rounded
they are the same, and in bf16 products may be."""

_LEFT = {
    "mixtral": "router", "qwen3_moe": "router", "gpt_oss": "router", "swin": "RelativePositionBias",
    "dinov2": "Embeddings", "beit": "Embeddings", "patchtst": "PositionalEncoding", "wav2vec2": "parametrization",
    "hubert": "parametrization",
}  # fmt: skip
"""What of which architecture is left besides vectors: a word of each reason."""


@pytest.mark.parametrize("scheme", _SCHEMES)
@pytest.mark.parametrize("name", ["cnn", "encoder", "gpt2"])
def test_every_scheme_runs_on_a_processor_with_instructions_for_none_and_says_the_same(
    name, scheme, monkeypatch, tmp_path
):
    module, batch = ZOO[name].build().eval(), ZOO[name].batch()
    module.log = module.log_dict = lambda *_, **__: None
    quantize(module, scheme)
    expected = module.training_step(batch, 0)
    save_compressed(module, tmp_path / "net")
    for instructions in ("_BYTES_ON_CPU", "_SUMS_IN_32_BITS", "_BF16_ON_CPU"):
        monkeypatch.setattr(hardware, instructions, False)
    elsewhere = load_compressed(tmp_path / "net", ZOO[name].build())
    elsewhere.log = elsewhere.log_dict = module.log
    torch.testing.assert_close(elsewhere.training_step(batch, 0), expected, rtol=0.01, atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", _SCHEMES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_compute_what_their_dense_weights_do_and_are_read_back_bit_by_bit(name, scheme, tmp_path):
    entry = ARCHITECTURES[name]
    module, batch = entry.build().eval(), entry.batch(2)
    dense = copy.deepcopy(module)
    with observe_inputs(module) as ranges:
        _outputs(module, batch)
    done = quantize(module, scheme, input_ranges=ranges)
    for key, parameter in module.named_parameters(remove_duplicate=False):
        dense.get_parameter(key).data = parameter.dequantize() if isinstance(parameter, PackedWeight) else parameter
    loaded = load_compressed(save_compressed(module, tmp_path / "net"), lambda: entry.build(seed=1))
    found, expected, again = (_outputs(each, batch) for each in (module, dense, loaded))
    for one, other, read in zip(found, expected, again, strict=True):
        assert (one - other).norm() <= _CLOSE.get(scheme, 1e-5) * other.norm() + 1e-6
        assert torch.equal(one, read)
    assert done.bytes_after < (0.6 if "16" in scheme else 0.4) * done.bytes_before
    left = {reason for reason in done.skipped.values() if "vector" not in reason and "would take" not in reason}
    assert all(_LEFT[name].lower() in reason.lower() for reason in left) if name in _LEFT else not left


def _outputs(module, batch):
    with torch.no_grad():
        found = module.model(**batch)
    shown = [value for key, value in found.items() if key != "past_key_values"]
    return [leaf.float() for leaf in tree_leaves(shown) if isinstance(leaf, torch.Tensor)]
