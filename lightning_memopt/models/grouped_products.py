"""Matrix products of groups of rows (mixtures of experts) on tensors without values.

torch computes them in three dtypes and knows the shape of their result in one, bfloat16. Adapter for
``torch._subclasses.fake_impls``, private; tried with torch 2.11 and 2.13.
"""

from typing import Any

import torch
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensorMode

GROUPED_PRODUCT: Any = torch.ops.aten._grouped_mm.default
"""The products of all experts of a mixture in one operator."""

_ALIGNMENT = 16
"""Bytes that rows of the result are multiples of, as the kernels make them."""


def teach_grouped_products() -> None:
    """Let fake tensors of every dtype be multiplied in groups; once is enough."""
    if GROUPED_PRODUCT not in fake_impls.op_implementations_dict:
        fake_impls.register_op_impl(GROUPED_PRODUCT)(_result_of)


def grouped_flops(a: torch.Tensor, b: torch.Tensor) -> int:
    """Of the product: each row is multiplied once, whatever group it is in."""
    if a.dim() == 2:
        return 2 * a.shape[0] * a.shape[1] * b.shape[-1]
    return 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[-1] if b.dim() == 3 else 2 * a.shape[1] * b.numel()


def _result_of(
    mode: FakeTensorMode,
    func: Any,
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    groups = [] if offs is None else [offs.shape[0]]
    if a.dim() == 2:
        shape = [*(groups if b.dim() == 2 else []), a.shape[0], b.shape[-1]]
    else:
        shape = [*(a.shape[:1] if b.dim() == 3 else []), a.shape[1], b.shape[-1]]
    dtype = out_dtype or a.dtype
    row = -(-shape[-1] * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT // dtype.itemsize
    strides = [shape[-2] * row, row, 1][-len(shape) :]
    make: Any = torch.empty_strided
    with mode:
        return make(shape, strides, dtype=dtype, device=a.device)
