"""Products of groups of rows have the shapes and strides on fake tensors that kernels give them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_memopt.models.grouped_products import GROUPED_PRODUCT, grouped_flops, teach_grouped_products
from lightning_memopt.techniques.checkpointing.profile import is_product, product_flops

SHAPES = {
    "rows by experts": ((16, 8), (2, 3, 8), 2 * 16 * 8 * 3),
    "gradients of experts": ((8, 16), (3, 16), 2 * 8 * 16 * 3),
    "experts by columns": ((2, 5, 8), (16, 8), 2 * 5 * 8 * 16),
    "experts by experts": ((2, 5, 8), (2, 3, 8), 2 * 2 * 5 * 8 * 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("a", "b", "flops"), SHAPES.values(), ids=SHAPES)
def test_a_fake_product_is_laid_out_as_a_real_one(a, b, flops, dtype):
    offsets = None if len(a) == len(b) == 3 else torch.tensor([8, 16], dtype=torch.int32)
    factors = torch.randn(a, dtype=dtype), torch.randn(b, dtype=dtype).transpose(-1, -2)
    real = torch.nn.functional.grouped_mm(*factors, offs=offsets)
    teach_grouped_products()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = torch.nn.functional.grouped_mm(*map(mode.from_tensor, factors), offs=offsets)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert grouped_flops(*factors) == flops
    assert is_product(GROUPED_PRODUCT) and product_flops(GROUPED_PRODUCT, factors, {}, real) == flops
