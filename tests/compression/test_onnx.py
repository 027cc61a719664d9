"""ONNX files that compute what the module computes."""

import pytest
import torch
from torch import nn

from lightning_memopt.compression.onnx import export_onnx
from lightning_memopt.compression.packed import PackedWeight
from lightning_memopt.compression.quantize import quantize
from tests.zoo.architectures import ARCHITECTURES

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp16", "nf4"])
def test_a_quantized_module_is_exported_and_computes_the_same_under_onnxruntime(scheme, tmp_path):
    module, x = _net().eval(), torch.randn(2, 1, 8, 8)
    quantize(module, scheme)
    path = export_onnx(module, x, tmp_path / "deep" / "net.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module(x).detach(), rtol=1e-3, atol=1e-4)
    assert isinstance(module[3].weight, PackedWeight)


@pytest.mark.parametrize(("scheme", "part"), [("int8", 0.3), ("fp8", 0.3), ("bf16", 0.53)])
def test_the_file_is_as_small_as_the_weights_are_and_tied_ones_are_in_it_once(scheme, part, tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(300, 128), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 300, bias=False))
    module[3].weight = module[0].weight
    x = torch.randint(0, 300, (2, 7))
    dense = export_onnx(module.eval(), x, tmp_path / "dense.onnx").stat().st_size
    quantize(module, scheme)
    assert export_onnx(module, x, tmp_path / "net.onnx").stat().st_size < part * dense


class TakesNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x, scale):
        return {"y": self.layer(x) * scale}


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_sizes_that_are_named_may_be_others_when_the_file_runs(scheme, tmp_path):
    module = TakesNames().eval()
    quantize(module, scheme)
    inputs = {"x": torch.randn(3, 64), "scale": torch.rand(3, 1)}
    path = export_onnx(
        module, inputs, tmp_path / "net.onnx", dynamic_shapes={"x": {0: "batch"}, "scale": {0: "batch"}}
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    others = {"x": torch.randn(7, 64), "scale": torch.rand(7, 1)}
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in others.items()})
    torch.testing.assert_close(torch.from_numpy(found), module(**others)["y"].detach(), rtol=1e-3, atol=1e-4)


def test_attention_is_small_in_the_file(tmp_path):
    module, x = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True).eval(), torch.randn(2, 5, 64)
    dense = export_onnx(module, x, tmp_path / "dense.onnx").stat().st_size
    quantize(module, "int8")
    assert export_onnx(module, x, tmp_path / "net.onnx").stat().st_size < 0.45 * dense


class Experts(nn.Module):
    """All experts on all inputs, from one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.weight = nn.Parameter(torch.randn(4, 96, 64) * torch.tensor([0.1, 1, 10, 100])[:, None, None])

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.weight)


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_experts_in_one_parameter_keep_a_scale_for_each_output_of_each(scheme, tmp_path):
    torch.manual_seed(0)
    module, x = Experts().eval(), torch.randn(3, 64)
    dense = export_onnx(module, x, tmp_path / "dense.onnx").stat().st_size
    quantize(module, scheme)
    assert export_onnx(module, x, tmp_path / "net.onnx").stat().st_size < 0.4 * dense


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "swin", "phi3"])
def test_architectures_are_exported_in_int8_whatever_computes_their_experts(name, tmp_path):
    class Logits(nn.Module):
        def __init__(self, model, key):
            super().__init__()
            self.model, self.key = model, key

        def forward(self, x):
            return self.model(**{self.key: x}).logits

    entry = ARCHITECTURES[name]
    key, x = next((key, x) for key, x in entry.batch(2).items() if key != "labels")
    module = Logits(entry.build().eval().model, key)
    quantize(module, "int8")
    assert export_onnx(module, x, tmp_path / "net.onnx").exists()


def test_what_cannot_be_exported_is_refused_by_name(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x * 2 if float(x.sum()) > 0 else x[:, :1]

    with pytest.raises(ValueError, match="Branching cannot be exported to ONNX"):
        export_onnx(Branching(), torch.ones(2, 3), tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


def test_a_file_that_onnxruntime_cannot_load_is_refused_and_removed(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no kernel for this operator")

    monkeypatch.setattr("onnxruntime.InferenceSession", fail)
    with pytest.raises(ValueError, match=r"Linear is exported, but onnxruntime cannot run .* no kernel"):
        export_onnx(nn.Linear(4, 2), torch.randn(3, 4), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
