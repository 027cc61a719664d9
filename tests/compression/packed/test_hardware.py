"""Products of integers, whatever the hardware has for them."""

import pytest
import torch
from torch.nn import functional as F

from lightning_memopt.compression.packed import Int8Weight, hardware

CPU = torch.device("cpu")


@pytest.fixture(params=["floats", "bytes"])
def way(request, monkeypatch):
    """Each way to multiply in turn."""
    if request.param == "bytes" and not hardware._BYTES_ON_CPU:
        pytest.skip("no AVX2, or torch without oneDNN")
    monkeypatch.setattr(hardware, "_BYTES_ON_CPU", request.param == "bytes")


def _integers(largest, shape, extreme):
    signs = torch.randint(0, 2, shape) * 2 - 1
    return signs * largest if extreme else torch.randint(-largest, largest + 1, shape)


@pytest.mark.parametrize("extreme", [False, True])
def test_integers_are_multiplied_exactly_and_the_largest_do_not_overflow(way, extreme):
    a = _integers(hardware.largest_input(CPU), (40, 1000), extreme)
    b = _integers(127, (1000, 24), False) if not extreme else torch.full((1000, 24), 127)
    product = hardware.multiply_integers(a.float(), b.to(torch.int8), hardware.largest_input(CPU))
    assert torch.equal(product.long(), a @ b)


def test_sums_are_not_trusted_to_instructions_that_the_user_keeps_onednn_from():
    has = {"avx2": True, "avx512_vnni": True}
    assert hardware.sums_in_32_bits(has, {}) and not hardware.sums_in_32_bits({"avx2": True}, {})
    assert not hardware.sums_in_32_bits(has, {"ONEDNN_MAX_CPU_ISA": "avx2"})
    assert not hardware.sums_in_32_bits(has, {"DNNL_MAX_CPU_ISA": "AVX512_CORE"})
    assert hardware.sums_in_32_bits(has, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"})


@pytest.mark.parametrize("options", [([1, 1], [1, 1], [1, 1]), ([2, 1], [0, 2], [1, 2])])
def test_images_of_integers_are_convolved_exactly_at_the_borders_too(way, options):
    images = torch.full((2, 30, 8, 9), hardware.largest_input(CPU))
    images[1] = _integers(hardware.largest_input(CPU), images[1].shape, False)
    filters = torch.full((24, 30, 3, 3), 127)
    filters[12:] = _integers(127, filters[12:].shape, False)
    zero = hardware.largest_input(CPU)
    product = hardware.convolve_integers(images.float(), filters.to(torch.int8), zero, *options)
    assert torch.equal(product.double(), F.conv2d(images.double(), filters.double(), None, *options))


def test_the_compiler_knows_the_shapes_and_the_layouts(way):
    x, weight = torch.randint(-63, 64, (40, 16)).float(), torch.randint(-9, 9, (16, 8), dtype=torch.int8)
    images, filters = torch.randint(-63, 64, (2, 4, 5, 5)).float(), torch.ones(8, 4, 3, 3, dtype=torch.int8)

    def both(x, images):
        product = hardware.multiply_integers(x, weight, 63)
        return product + 1, hardware.convolve_integers(images, filters, 63, [1, 1], [1, 1], [1, 1]) + 1

    for actual, expected in zip(torch.compile(both, backend="aot_eager")(x, images), both(x, images), strict=True):
        assert torch.equal(actual, expected) and actual.stride() == expected.stride()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 32])
@pytest.mark.parametrize("width", [64, 60])
def test_dynamic_products_on_a_gpu_are_those_of_a_cpu(cuda, rows, width):
    weight, x = Int8Weight.pack(torch.randn(width, 64), inputs="dynamic"), torch.randn(rows, 64)
    expected = torch.nn.functional.linear(x, weight)
    actual = torch.nn.functional.linear(x.to(cuda), weight.to(cuda))
    torch.testing.assert_close(actual.cpu(), expected, rtol=2e-2, atol=0.2)
