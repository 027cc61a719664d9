"""ExecuTorch programs compute what the module does, or are not left."""

import sys

import pytest
import torch
from torch import nn

from lightning_memopt.compression.executorch import export_executorch
from lightning_memopt.compression.quantize import quantize
from tests.zoo import ZOO


def _net():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_a_program_is_written_that_computes_the_same(scheme, tmp_path):
    net = _net()
    if scheme:
        quantize(net, scheme)
    path = export_executorch(net, torch.randn(4, 1, 8, 8), tmp_path / "new" / "net.pte")
    assert path.stat().st_size > 4 * 8 * 36 * 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "llama", "bert_qa", "mamba"])
def test_transformers_are_written_and_compute_the_same(name, tmp_path):
    model, batch = next(ZOO[name].build().children()).eval(), ZOO[name].batch()
    inputs = batch["input_ids"] if "input_ids" in batch else batch["pixel_values"]
    assert export_executorch(model, inputs, tmp_path / "net.pte").exists()


def test_what_cannot_be_exported_is_said_and_leaves_no_file(tmp_path):
    class Reads(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(ValueError, match="Reads cannot be exported to ExecuTorch"):
        export_executorch(Reads(), torch.randn(2), tmp_path / "net.pte")
    assert not (tmp_path / "net.pte").exists()


def test_without_executorch_the_extra_to_install_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch", None)
    monkeypatch.setitem(sys.modules, "executorch.runtime", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-memopt\[executorch\]"):
        export_executorch(_net(), torch.randn(4, 1, 8, 8), tmp_path / "net.pte")
