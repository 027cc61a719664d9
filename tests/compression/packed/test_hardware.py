"""Products of integers, whatever the hardware has for them."""

import pytest
import torch

from lightning_memopt.compression.packed import Int8Weight, hardware


@pytest.mark.parametrize("has_instructions", [False, True])
def test_integers_are_multiplied_exactly_with_and_without_instructions_for_it(has_instructions, monkeypatch):
    monkeypatch.setattr(hardware, "_INT8_ON_CPU", has_instructions)
    a, b = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((5, 1000), (1000, 24)))
    assert torch.equal(hardware.multiply_integers(a, b).long(), a.long() @ b.long())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 32])
@pytest.mark.parametrize("width", [64, 60])
def test_dynamic_products_on_a_gpu_are_those_of_a_cpu(cuda, rows, width):
    weight, x = Int8Weight.pack(torch.randn(width, 64), inputs="dynamic"), torch.randn(rows, 64)
    expected = torch.nn.functional.linear(x, weight)
    actual = torch.nn.functional.linear(x.to(cuda), weight.to(cuda))
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-2, atol=0.1)
