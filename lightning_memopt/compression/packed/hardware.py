"""Which products this hardware is fast at."""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def sums_in_32_bits(capabilities: Mapping[str, Any], environment: Mapping[str, str]) -> bool:
    """Whether oneDNN adds products of bytes in 32 bits: VNNI and AMX do, unless the user told it not to use them.

    Args:
        capabilities: Of the processor.
        environment: Of the process; ``ONEDNN_MAX_CPU_ISA`` caps what oneDNN uses (``DNNL_MAX_CPU_ISA`` before it).
    """
    cap = environment.get("ONEDNN_MAX_CPU_ISA", environment.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    has = any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return has and cap not in ("SSE41", "AVX", "AVX2", "AVX512_CORE")


_CPU = torch.cpu.get_capabilities()
_SUMS_IN_32_BITS = sums_in_32_bits(_CPU, os.environ)
_BF16_ON_CPU = any(_CPU.get(name) for name in ("avx512_bf16", "amx_bf16"))
_BYTES_ON_CPU = bool(_CPU.get("avx2")) and torch.backends.mkldnn.is_available()

SMALLEST = 8192
"""Elements of a weight below which multiplying floats is faster than calling oneDNN's kernel for integers."""


def largest_input(device: torch.device) -> int:
    """The largest integer that inputs of products are rounded to on ``device``: 127, or 63.

    oneDNN's kernels multiply bytes without a sign by bytes with one. Processors with AVX2 and without VNNI or AMX add
    pairs of such products in 16 bits, cut off beyond 32,767. A pair of weights up to 127 and inputs of 8 bits reaches
    64,770, of 7 bits 32,258. So inputs have 7 bits there, and weights, which files are made of, 8 bits everywhere.
    """
    return 63 if in_bytes(device) and not _SUMS_IN_32_BITS else 127


def multiply_integers(inputs: Tensor, weight: Tensor, zero: int) -> Tensor:
    """The product in fp32 of a matrix of integers, held as floats, and an int8 matrix.

    By floats where the hardware has no instructions for integers, or none for these sizes. Products are exact in
    fp32, and so are sums of up to 1040; longer ones are rounded.

    Args:
        inputs: ``-zero`` to ``2 * largest_input + 1 - zero``: kernels that take no sign add up pairs of more wrongly.
        weight: (in, out).
        zero: What makes all inputs positive.
    """
    rows, inner, columns = *inputs.shape, weight.shape[1]
    # Fewer rows do not pay for bringing the weight into order, and smaller ones not for calling the kernel.
    if in_bytes(inputs.device) and rows >= 32 and weight.numel() >= SMALLEST:
        return _multiply_bytes((inputs + zero).to(torch.uint8), weight, zero)
    if inputs.is_cuda and rows > 16 and inner % 8 == 0 and columns % 8 == 0:  # what cuBLAS asks for
        return torch._int_mm(inputs.to(torch.int8), weight).float()
    with without_autocast(inputs.device):  # sums of integers are more than fp16 holds
        return inputs.float() @ weight.float()


def convolve_integers(
    inputs: Tensor, weight: Tensor, zero: int, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """As :func:`multiply_integers`, for a batch of images and the filters of ``F.conv2d``."""
    if in_bytes(inputs.device) and weight.numel() >= SMALLEST:
        return _convolve_bytes((inputs + zero).to(torch.uint8), weight, zero, stride, padding, dilation)
    with without_autocast(inputs.device):  # as above
        return F.conv2d(inputs.float(), weight.float(), None, stride, padding, dilation)


def convolved_size(
    size: Sequence[int], kernel: Sequence[int], stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:
    """Height and width of what a convolution makes of images of ``size``."""
    options = zip(size, kernel, stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in options]


def is_fast_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ``device`` multiplies matrices of a 16-bit ``dtype`` at least as fast as of fp32."""
    return device.type != "cpu" or (dtype is torch.bfloat16 and _BF16_ON_CPU)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast computes products on ``device`` in; ``None`` outside of it."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Within it products on ``device`` are computed in the type of what is multiplied."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def in_bytes(device: torch.device) -> bool:
    """Whether ``device`` multiplies bytes without a sign, by oneDNN's kernels."""
    return device.type == "cpu" and _BYTES_ON_CPU


# oneDNN's kernels read weights in an order of their own, which they are brought into at each call: keeping them so
# would take as many bytes again. Operators of our own, since the compiler cannot look into tensors in that order.


@torch.library.custom_op("lightning_memopt::multiply_bytes", mutates_args=(), device_types="cpu")
def _multiply_bytes(inputs: Tensor, weight: Tensor, zero: int) -> Tensor:
    packed = weight.t().contiguous().to_mkldnn().transpose(0, 1)
    return torch.ops.onednn.qlinear_pointwise(
        inputs, 1.0, zero, packed, torch.ones(1), torch.zeros(1, dtype=torch.int32), None, 1.0, 0, torch.float32,
        "none", [], "",
    )  # fmt: skip


@_multiply_bytes.register_fake
def _(inputs: Tensor, weight: Tensor, zero: int) -> Tensor:
    return inputs.new_empty(inputs.shape[0], weight.shape[1], dtype=torch.float32)


@torch.library.custom_op("lightning_memopt::convolve_bytes", mutates_args=(), device_types="cpu")
def _convolve_bytes(
    inputs: Tensor, weight: Tensor, zero: int, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    scale, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int32)
    packed = torch.ops.onednn.qconv_prepack(
        weight, scale, 1.0, zero, stride, padding, dilation, 1, list(inputs.shape)
    )
    return torch.ops.onednn.qconv_pointwise(
        inputs, 1.0, zero, packed, scale, zeros, None, stride, padding, dilation, 1, 1.0, 0, torch.float32,
        "none", [], "",
    )  # fmt: skip


@_convolve_bytes.register_fake
def _(
    inputs: Tensor, weight: Tensor, zero: int, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    size = convolved_size(inputs.shape[2:], weight.shape[2:], stride, padding, dilation)
    shape = (inputs.shape[0], weight.shape[0], *size)
    return inputs.new_empty(shape, dtype=torch.float32).to(memory_format=torch.channels_last)
