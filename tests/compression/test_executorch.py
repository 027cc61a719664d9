"""ExecuTorch programs compute what the module does, or are not left."""

import pytest
import torch
from torch import nn

from lightning_memopt.compression.executorch import export_executorch
from lightning_memopt.compression.quantize import quantize


def _has_executorch():
    try:
        import executorch.runtime  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


needs_executorch = pytest.mark.skipif(not _has_executorch(), reason="executorch is not installed")


def _net():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()


@needs_executorch
@pytest.mark.parametrize("scheme", [None, "int8"])
def test_a_program_is_written_that_computes_the_same(scheme, tmp_path):
    net = _net()
    if scheme:
        quantize(net, scheme)
    path = export_executorch(net, torch.randn(4, 1, 8, 8), tmp_path / "new" / "net.pte")
    assert path.stat().st_size > 4 * 8 * 36 * 10


@needs_executorch
def test_what_cannot_be_exported_is_said_and_leaves_no_file(tmp_path):
    class Reads(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(ValueError, match="Reads cannot be exported to ExecuTorch"):
        export_executorch(Reads(), torch.randn(2), tmp_path / "net.pte")
    assert not (tmp_path / "net.pte").exists()


@pytest.mark.skipif(_has_executorch(), reason="executorch is installed")
def test_without_executorch_the_extra_to_install_is_named(tmp_path):
    with pytest.raises(ModuleNotFoundError, match=r"lightning-memopt\[executorch\]"):
        export_executorch(_net(), torch.randn(4, 1, 8, 8), tmp_path / "net.pte")
