"""Weights in 16, 8 or 4 bits of floating point."""

from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_memopt.compression.packed.base import TINY, PackedWeight, one_of_blocks, one_of_stack
from lightning_memopt.compression.packed.hardware import is_fast_in

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class HalfWeight(PackedWeight):
    """A weight stored in fp16 or bf16 for a module that computes in another type.

    Linear maps are computed in 16 bits where the device is fast at that, and otherwise by the widened weight.

    Attributes:
        values: fp16 or bf16, of the weight's shape.
        kind: ``"fp16"`` or ``"bf16"``.
    """

    part_names = ("values",)
    attribute_names = ("kind",)
    values: Tensor  # type: ignore[assignment]
    kind: str

    @classmethod
    def pack(cls, weight: Tensor, output_dim: int | tuple[int, ...] = 0, *, kind: str = "bf16", **_: Any) -> Self:
        """Round each element to 16 bits; beyond fp16's range, to its largest."""
        dtype = HALVES[kind]
        largest = min(torch.finfo(dtype).max, torch.finfo(weight.dtype).max)
        values = weight.detach().clamp(-largest, largest).to(dtype)
        return cls({"values": values}, {"kind": kind}, weight.shape, weight.dtype)

    def well_formed(self) -> bool:
        """Whether the values are of the type and shape that they should be."""
        return self.values.shape == self.shape and self.values.dtype is HALVES[self.kind]

    def dequantize(self) -> Tensor:
        """The values, widened."""
        return self.values.to(self.dtype)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """In 16 bits where the device is fast at it."""
        if not is_fast_in(self.values.dtype, x.device):
            return super().linear(x, bias)
        product = F.linear(x.to(self.values.dtype), self.values).to(x.dtype)
        return product if bias is None else product + bias

    def piece(self, index: Any) -> Self:
        """The values of one matrix; nothing is widened."""
        return one_of_stack(self, index)

    def rows(self, indices: Tensor) -> Tensor:
        """Widen the rows that are looked up and no others."""
        return self.values[indices].to(self.dtype)


class Float8Weight(PackedWeight):
    """Floats of 8 bits (e4m3, https://arxiv.org/abs/2209.05433) with an fp32 scale for each output.

    Stored so and computed with in the type of the inputs: it needs no hardware for 8-bit floats.

    Attributes:
        values: float8_e4m3fn, of the weight's shape; the largest of an output is 448.
        scale: fp32, of the weight's shape with 1 everywhere but in the dimension of the outputs.
    """

    part_names = ("values", "scale")
    values: Tensor  # type: ignore[assignment]
    scale: Tensor

    @classmethod
    def pack(cls, weight: Tensor, output_dim: int | tuple[int, ...] = 0, **_: Any) -> Self:
        """Scale each output so that its largest magnitude is the largest that 8 bits hold."""
        largest = torch.finfo(torch.float8_e4m3fn).max
        kept = output_dim if isinstance(output_dim, tuple) else (output_dim,)
        others = [dim for dim in range(weight.dim()) if dim not in kept]
        scale = weight.detach().abs().amax(others, keepdim=True).float().clamp_min(TINY * largest) / largest
        values = (weight.detach().float() / scale).clamp(-largest, largest).to(torch.float8_e4m3fn)
        return cls({"values": values, "scale": scale}, {}, weight.shape, weight.dtype)

    def well_formed(self) -> bool:
        """Whether there is a scale for each output."""
        fits = all(n in (1, size) for n, size in zip(self.scale.shape, self.shape, strict=True))
        types = (self.values.dtype, self.scale.dtype) == (torch.float8_e4m3fn, torch.float32)
        return fits and types and self.values.shape == self.shape

    def dequantize(self) -> Tensor:
        """The values times their scales."""
        return (self.values.float() * self.scale).to(self.dtype)

    def piece(self, index: Any) -> Self:
        """The values of one matrix with their scales; nothing is unpacked."""
        return one_of_stack(self, index)

    def rows(self, indices: Tensor) -> Tensor:
        """Unpack the rows that are looked up and no others."""
        if self.scale.shape[1] != 1:
            return super().rows(indices)
        # Bytes, since there is no look-up among 8-bit floats.
        values = self.values.view(torch.uint8)[indices].view(torch.float8_e4m3fn)
        return (values.float() * self.scale[indices]).to(self.dtype)


class NF4Weight(PackedWeight):
    """The 4-bit "normal float" of QLoRA (https://arxiv.org/abs/2305.14314), unpacked by bitsandbytes.

    Attributes:
        values: uint8, two elements in a byte.
        absmax: fp32, the largest magnitude of each 64 elements.
    """

    part_names = ("values", "absmax")
    values: Tensor  # type: ignore[assignment]
    absmax: Tensor
    BLOCK = 64

    @classmethod
    def pack(cls, weight: Tensor, output_dim: int | tuple[int, ...] = 0, **_: Any) -> Self:
        """Round each element to the nearest of 16 levels, spaced as a normal distribution is.

        The last level stands for the largest magnitude of a block, or for a little less: whichever errs least, in
        squares. Where one element is cut off, all others are rounded more finely.
        """
        count = weight.numel()
        blocks = F.pad(weight.detach().float().flatten(), (0, -count % cls.BLOCK)).view(-1, cls.BLOCK)
        levels = cls._levels(weight.device)
        least, codes, absmax = _rounded(blocks, levels, 1.0)
        for part in (0.95, 0.9):
            error, others, smaller = _rounded(blocks, levels, part)
            codes = torch.where((error < least)[:, None], others, codes)
            absmax = torch.where(error < least, smaller, absmax)
            least = torch.minimum(error, least)
        values = (codes[:, 0::2] << 4 | codes[:, 1::2]).flatten()[: -(-count // 2)].reshape(-1, 1)
        return cls({"values": values, "absmax": absmax}, {}, weight.shape, weight.dtype)

    @classmethod
    def _levels(cls, device: torch.device) -> Tensor:
        """The 16 levels in their order, as bitsandbytes unpacks them."""
        codes = torch.arange(16, dtype=torch.uint8, device=device)
        values, one = (codes[0::2] << 4 | codes[1::2]).reshape(-1, 1), torch.ones(1, device=device)
        levels: Tensor = _bitsandbytes().dequantize_4bit(values, one, cls.BLOCK, "nf4", [1, 16], torch.float32)
        return levels.flatten()

    def well_formed(self) -> bool:
        """Whether there are bytes for all elements and a magnitude for each block."""
        types = (self.values.dtype, self.absmax.dtype) == (torch.uint8, torch.float32)
        blocks = -(-self.numel() // self.BLOCK)
        return types and self.values.numel() == -(-self.numel() // 2) and self.absmax.numel() == blocks

    def dequantize(self) -> Tensor:
        """The levels times the magnitude of their block."""
        # As one row: bitsandbytes' AVX512 kernel takes wrong magnitudes for rows that are shorter than a block.
        dense = _bitsandbytes().dequantize_4bit(
            self.values, self.absmax, self.BLOCK, "nf4", [1, self.numel()], torch.float32
        )
        return dense.view(self.shape).to(self.dtype)

    def piece(self, index: Any) -> Tensor:
        """Unpack one matrix and no other, where it is whole blocks."""
        return one_of_blocks(self, index, self.BLOCK)

    def rows(self, indices: Tensor) -> Tensor:
        """Unpack the rows that are looked up and no others, where rows are whole blocks."""
        count, width = self.shape
        if width % self.BLOCK:
            return super().rows(indices)
        chosen = indices.flatten()
        dense = _bitsandbytes().dequantize_4bit(
            self.values.view(count, -1)[chosen].reshape(-1, 1),
            self.absmax.view(count, -1)[chosen].flatten(),
            self.BLOCK,
            "nf4",
            [len(chosen), width],
            torch.float32,
        )
        return dense.view(*indices.shape, width).to(self.dtype)


def _rounded(blocks: Tensor, levels: Tensor, part: float) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error, codes and magnitude of each block whose last level is ``part`` of its largest element."""
    largest = part * blocks.abs().amax(1, keepdim=True)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / largest.clamp_min(TINY), between, out_int32=True)
    error = (levels[codes] * largest - blocks).square().sum(1)
    return error, codes.to(torch.uint8), largest.squeeze(1)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes  # noqa: F401  (registers the operators)
    except ImportError as error:
        raise ImportError(
            "nf4 weights are unpacked by bitsandbytes, which is not installed; "
            "`pip install 'lightning-memopt[quantize]'`."
        ) from error
    return torch.ops.bitsandbytes
