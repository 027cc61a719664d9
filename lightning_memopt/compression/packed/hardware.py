"""Which products this hardware is fast at."""

import torch
from torch import Tensor

_CPU = torch.cpu.get_capabilities()
_INT8_ON_CPU = any(_CPU.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
_BF16_ON_CPU = any(_CPU.get(name) for name in ("avx512_bf16", "amx_bf16"))


def multiply_integers(a: Tensor, b: Tensor) -> Tensor:
    """The product of two int8 matrices in fp32.

    By floats where the hardware has no instructions for integers, or none for these sizes: torch's own fallback is
    some twenty times slower. Products are exact in fp32, and so are sums of up to 1040; longer ones are rounded.
    """
    rows, inner, columns = *a.shape, b.shape[1]
    on_gpu = a.is_cuda and rows > 16 and inner % 8 == 0 and columns % 8 == 0  # what cuBLAS asks for
    fits = on_gpu or (a.device.type == "cpu" and _INT8_ON_CPU)
    return torch._int_mm(a, b).float() if fits else a.float() @ b.float()


def is_fast_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ``device`` multiplies matrices of a 16-bit ``dtype`` at least as fast as of fp32."""
    return device.type != "cpu" or (dtype is torch.bfloat16 and _BF16_ON_CPU)
