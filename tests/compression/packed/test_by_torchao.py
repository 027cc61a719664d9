"""Weights that torchao holds and multiplies: as by its own API, in more modules, and in files."""

import copy
import json
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)
from transformers.pytorch_utils import Conv1D

from lightning_memopt.compression.container import CompressedFileError, load_compressed, save_compressed
from lightning_memopt.compression.packed import Int4Weight, Int8Weight, PackedWeight, TorchaoWeight
from lightning_memopt.compression.quantize import check_hardware, module_bytes, quantize
from lightning_memopt.compression.recipe import Recipe
from lightning_memopt.compression.sensitivity import scan_sensitivity
from tests.zoo import ZOO, slow_where

CONFIGS = {
    "int8": Int8WeightOnlyConfig(version=2),
    "int8_dynamic": Int8DynamicActivationInt8WeightConfig(version=2),
    "fp8": Float8WeightOnlyConfig(),
}


QUICK = {"encoder", "cnn", "gpt2"}


def _loss(module, batch):
    found = module.training_step(batch, 0)
    return float(found["loss"] if isinstance(found, dict) else found)


@pytest.mark.parametrize("scheme", CONFIGS)
def test_linear_layers_compute_what_they_do_quantized_by_torchao_itself_in_as_many_bytes(scheme):
    ours = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 64)).eval()
    theirs, x = copy.deepcopy(ours), torch.randn(4, 256)
    quantize_(theirs, CONFIGS[scheme])
    done = quantize(ours, scheme, engine="torchao")
    assert done.packed == ["0.weight", "2.weight"] and not done.fallbacks
    assert torch.equal(ours(x), theirs(x))
    held = [getattr(layer.weight, name) for layer in theirs[::2] for name in layer.weight.__tensor_flatten__()[0]]
    assert module_bytes(ours) == sum(part.nbytes for part in held) + 4 * (512 + 64)


@pytest.mark.parametrize("scheme", CONFIGS)
@pytest.mark.parametrize("name", slow_where(sorted(ZOO.keys() - {"gan", "late_mlp"}), ZOO.keys() - QUICK))
def test_every_module_of_the_zoo_computes_nearly_the_same_loss_and_exactly_so_when_read_back(name, scheme, tmp_path):
    entry = ZOO[name]
    module, batch = entry.build().eval(), entry.batch()
    quantized = copy.deepcopy(module)
    done = quantize(quantized, scheme, engine="torchao")
    loaded = load_compressed(save_compressed(quantized, tmp_path / "net"), module=entry.build)
    for each in (module, quantized, loaded):
        each.log = each.log_dict = lambda *_, **__: None
    loss = _loss(quantized, batch)
    assert loss == pytest.approx(_loss(module, batch), rel=0.02 if scheme == "fp8" else 0.005)
    assert _loss(loaded, batch) == loss
    held = {key: type(parameter) for key, parameter in quantized.named_parameters()}
    ours = {key for key, kind in held.items() if issubclass(kind, PackedWeight) and kind is not TorchaoWeight}
    assert set(done.fallbacks) == ours  # what torchao does not take is packed here, and said
    assert TorchaoWeight in held.values() or name == "lstm"


def test_what_torchao_does_not_take_is_packed_by_us_and_named():
    net = nn.ModuleDict({"embed": nn.Embedding(100, 64), "conv": nn.Conv2d(16, 16, 3), "linear": nn.Linear(64, 64)})
    done = quantize(net, "int8", engine="torchao")
    assert type(net["embed"].weight) is type(net["conv"].weight) is Int8Weight
    assert set(done.fallbacks) == {"embed.weight", "conv.weight"}
    assert done.fallbacks["conv.weight"] == "packed by lightning_memopt: torchao holds linear maps alone"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_modules_of_every_type_compute_in_it(dtype):
    for layer in (nn.Linear(64, 48), Conv1D(48, 64)):
        layer, x = layer.to(dtype), torch.randn(4, 64, dtype=dtype)
        expected = layer(x)
        quantize(layer, "int8_dynamic", engine="torchao")
        assert layer(x).dtype == dtype and (layer(x) - expected).norm() < 0.03 * expected.norm()


def test_a_module_that_is_compiled_whole_computes_as_it_does_uncompiled():
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), Conv1D(32, 64)).eval()
    quantize(net, "int8_dynamic", engine="torchao")
    x = torch.randn(8, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, fullgraph=True)(x), net(x), rtol=1e-4, atol=1e-4)


def test_copies_and_moves_compute_the_same():
    net = nn.Sequential(nn.Linear(64, 64))
    quantize(net, "int8_dynamic", engine="torchao")
    x = torch.randn(8, 64)
    again = copy.deepcopy(net).to("cpu", torch.float32)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(x), net(x)) and type(again[0].weight.data) is TorchaoWeight
    assert torch.equal(F.linear(x, net[0].weight.t().t(), net[0].bias), net(x))


def test_a_recipe_and_a_scan_hold_weights_by_torchao():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    found = scan_sensitivity(net, lambda net: -float(module_bytes(net)), ["int8"], mode="min", engine="torchao")
    recipe = found.mixed(1e9, lambda net: -float(module_bytes(net)), net)
    assert recipe.quantize[0]["engine"] == "torchao"
    recipe.apply(net)
    assert all(type(layer.weight.data) is TorchaoWeight for layer in net)
    given = Recipe.from_dict({"quantize": {"scheme": "fp8", "engine": "torchao"}})
    given.apply(other := nn.Sequential(nn.Linear(64, 64)))
    assert type(other[0].weight.data) is TorchaoWeight
    with pytest.raises(ValueError, match="engine='tensorrt' is not known; possible are 'memopt', 'torchao'"):
        Recipe.from_dict({"quantize": {"scheme": "fp8", "engine": "tensorrt"}})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose kernels these are")
def test_a_scheme_that_this_hardware_has_no_kernels_for_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'int4_weight_only' on cpu here .*Leave engine='torchao' out"):
        check_hardware("int4_weight_only", "torchao", torch.device("cpu"))


@pytest.mark.gpu
def test_4_bits_are_multiplied_by_torchaos_kernels_on_gpus(cuda, tmp_path):
    net, x = nn.Sequential(nn.Linear(1024, 1024)).to(cuda), torch.randn(8, 1024, device=cuda)
    expected = net(x)
    done = quantize(net, "int4_weight_only", engine="torchao")
    assert done.bytes_after < 0.16 * done.bytes_before
    assert (net(x) - expected).norm() < 0.2 * expected.norm()
    loaded = load_compressed(save_compressed(net, tmp_path / "net"), module=nn.Sequential(nn.Linear(1024, 1024)))
    assert torch.equal(loaded.to(cuda)(x), net(x))


@pytest.mark.parametrize("scheme", ["int8_static", "nf4", "bf16"])
def test_what_torchao_does_not_hold_by_is_refused_with_what_it_does(scheme):
    with pytest.raises(ValueError, match=f"scheme='{scheme}' is none .* 'int8_weight_only', 'int8_dynamic'"):
        quantize(nn.Sequential(nn.Linear(64, 64)), scheme, engine="torchao")


def test_a_missing_torchao_is_said_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r"needs torchao.*pip install 'lightning-memopt\[quantize\]'"):
        quantize(nn.Sequential(nn.Linear(64, 64)), "int8", engine="torchao")


@pytest.mark.parametrize(
    "lie",
    [
        lambda record: record["attributes"].update(scheme="int8_static"),
        lambda record: record["attributes"].update(scheme="fp8"),
        lambda record: record["attributes"].update(output_dim=2),
        lambda record: record["attributes"].pop("scheme"),
        lambda record: record["parts"].pop("scale"),
        lambda record: record.update(parts=3),
        lambda record: record["parts"]["scale"].update(shape=[1, 48]),
        lambda record: record.update(dtype="int64"),
    ],
)
def test_a_record_that_lies_is_refused(lie, tmp_path):
    net = nn.Sequential(nn.Linear(64, 48))
    quantize(net, "int8", engine="torchao")
    folder = save_compressed(net, tmp_path / "net")
    manifest = json.loads((folder / "manifest.json").read_text())
    lie(manifest["tensors"]["0.weight"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CompressedFileError, match=r"0\.weight"):
        load_compressed(folder, module=nn.Sequential(nn.Linear(64, 48)))


def test_4_bits_of_inputs_that_its_groups_do_not_divide_are_ours_and_said():
    net = nn.Sequential(nn.Linear(96, 256))
    done = quantize(net, "int4_weight_only", engine="torchao")
    assert type(net[0].weight.data) is Int4Weight and "no multiple of the 128" in done.fallbacks["0.weight"]
