"""ONNX files that compute what the module computes."""

import pytest
import torch
from torch import nn

from lightning_memopt.compression.onnx import export_onnx
from lightning_memopt.compression.quantize import quantize

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


def test_a_quantized_module_is_exported_and_computes_the_same_under_onnxruntime(tmp_path):
    module, x = _net().eval(), torch.randn(2, 1, 8, 8)
    quantize(module, "int8")
    path = export_onnx(module, x, tmp_path / "deep" / "net.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module(x).detach(), rtol=1e-3, atol=1e-4)
    assert type(module[3].weight).__name__ == "Int8Weight"


def test_what_cannot_be_exported_is_refused_by_name(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x * 2 if float(x.sum()) > 0 else x[:, :1]

    with pytest.raises(ValueError, match="Branching cannot be exported to ONNX"):
        export_onnx(Branching(), torch.ones(2, 3), tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()
