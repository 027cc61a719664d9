"""Weights in 8 or 4 bits: integers with a scale for each output, or for each group of inputs."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_memopt.compression.packed.base import TINY, PackedWeight, one_of_blocks, one_of_stack
from lightning_memopt.compression.packed.hardware import (
    autocast_dtype,
    convolve_integers,
    convolved_size,
    in_bytes,
    largest_input,
    multiply_integers,
)

Inputs = Sequence[float] | str
"""How inputs are rounded: ``"dynamic"``, or between two numbers."""

GROUP = 32
"""Inputs that share a scale and a minimum in 4 bits: 0.5 + 4/32 bytes an element."""


FEWEST = 32
"""Inputs of an output below which convolving integers takes longer than convolving floats."""


class Int8Weight(PackedWeight):
    """Symmetric 8-bit integers with an fp32 scale for each output (row of a linear layer, channel, row of a table).

    Attributes:
        values: int8, of the weight's shape, in -127..127.
        scale: fp32, of the weight's shape with 1 everywhere but in the dimension of the outputs.
        inputs: Round the inputs of linear maps and plain 2-d convolutions too, and multiply integers: ``"dynamic"``
            scales each row (each image) by its largest magnitude; two numbers are the smallest and the largest input
            that is expected; ``None`` leaves inputs alone.
    """

    part_names = ("values", "scale")
    attribute_names: ClassVar[tuple[str, ...]] = ("inputs",)
    values: Tensor  # type: ignore[assignment]
    scale: Tensor
    inputs: Inputs | None

    @classmethod
    def pack(
        cls,
        weight: Tensor,
        output_dim: int | tuple[int, ...] = 0,
        *,
        inputs: Inputs | None = None,
        whole: bool = False,
        **_: Any,
    ) -> Self:
        """Round to multiples of the largest magnitude / 127: of that of each output; ``whole``: of that of all."""
        kept = () if whole else output_dim if isinstance(output_dim, tuple) else (output_dim,)
        others = [dim for dim in range(weight.dim()) if dim not in kept]
        scale = weight.detach().abs().amax(others, keepdim=True).float().clamp_min(TINY) / 127
        values = (weight.detach().float() / scale).round().clamp(-127, 127).to(torch.int8)
        return cls({"values": values, "scale": scale}, {"inputs": inputs}, weight.shape, weight.dtype)

    def well_formed(self) -> bool:
        """Whether there is a scale for each output, or each input, or one for all."""
        fits = all(n in (1, size) for n, size in zip(self.scale.shape, self.shape, strict=True))
        types = self.values.dtype == torch.int8 and self.scale.dtype == torch.float32 and self._inputs_known()
        return fits and types and self.values.shape == self.shape

    def dequantize(self) -> Tensor:
        """The integers times their scales."""
        return (self.values * self.scale).to(self.dtype)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply by the integers and scale the result, which has fewer elements than the weight."""
        if self.scale.shape[1] != 1:
            return super().linear(x, bias)
        if self._sums_overflow(x):
            return super().linear(x, bias)
        return self._product(x, self.values.t(), self.scale.t(), bias)

    def transposed_linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As :meth:`linear`, for a weight that is stored (in, out)."""
        if self.scale.shape[0] != 1:
            return super().transposed_linear(x, bias)
        if self._sums_overflow(x):
            return super().transposed_linear(x, bias)
        return self._product(x, self.values, self.scale, bias)

    def transposed(self) -> Self:
        """The integers and their scales, transposed; nothing is copied."""
        parts = {"values": self.values.t(), "scale": self.scale.t()}
        return type(self)(parts, self.attributes, self.shape[::-1], self.dtype)

    def piece(self, index: Any) -> Self:
        """The integers of one matrix with their scales; nothing is unpacked."""
        return one_of_stack(self, index)

    def conv2d(self, x: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
        """Convolve integers and scale the result, where inputs are rounded and there are enough to gain by it."""
        is_large = groups == 1 and self.values[0].numel() >= FEWEST
        if self.inputs is None:
            return super().conv2d(x, bias, stride, padding, dilation, groups)
        if not is_large or isinstance(padding, str) or self.scale[0].numel() != 1:
            # Channels last, as convolutions of integers after it want their images.
            weight = self.dequantize().to(x.dtype)
            is_gray = weight.shape[1] == groups == 1 and not isinstance(padding, str)
            if is_gray and weight[0].numel() <= len(weight):  # so that patches take no more than what comes out
                return convolve_as_rows(x, weight, bias, stride, padding, dilation)
            weight = weight.clone(memory_format=torch.channels_last)
            return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        images = x if x.dim() == 4 else x[None]
        integers, step, zero = round_inputs(images, self.inputs, (1, 2, 3))
        product = convolve_integers(integers, self.values, zero, *map(pair, (stride, padding, dilation)))
        product = (product * (step * self.scale.view(-1, 1, 1))).to(x.dtype)
        product = product if bias is None else product + bias.view(-1, 1, 1)
        return product if x.dim() == 4 else product[0]

    def rows(self, indices: Tensor) -> Tensor:
        """Unpack the rows that are looked up and no others."""
        if self.scale.shape[1] != 1:
            return super().rows(indices)
        scale = self.scale.expand(len(self.values), 1)
        return (self.values[indices] * scale[indices]).to(self.dtype)

    def _inputs_known(self) -> bool:
        if self.inputs is None or self.inputs == "dynamic":
            return True
        if not isinstance(self.inputs, list) or [type(end) for end in self.inputs] != [float, float]:
            return False
        low, high = self.inputs
        return -float("inf") < low <= 0 <= high < float("inf") and low < high

    def _sums_overflow(self, x: Tensor) -> bool:
        """Whether products with the integers, which are scaled later, may be more than fp16 holds."""
        return self.inputs is None and torch.float16 in (x.dtype, autocast_dtype(x.device))

    def _product(self, x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        if self.inputs is not None:
            integers, step, zero = round_inputs(as_rows(x), self.inputs, (1,))
            product = (multiply_integers(integers, values, zero) * step).reshape(*x.shape[:-1], values.shape[1])
        else:
            product = x @ values.to(x.dtype)
        product = (product * scale.flatten()).to(x.dtype)
        return product if bias is None else product + bias


def as_rows(x: Tensor) -> Tensor:
    """``x`` as a matrix that the compiler computes once, and not again for its largest value."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.as_strided(rows.size(), rows.stride())


def round_inputs(x: Tensor, inputs: Inputs, dims: tuple[int, ...]) -> tuple[Tensor, Tensor | float, int]:
    """Round inputs to as many bits as the device multiplies without overflow.

    Args:
        x: Inputs of any floating-point type.
        inputs: ``"dynamic"``, or the smallest and the largest that are expected.
        dims: What shares a scale if that is dynamic.

    Returns:
        Integers, as floats; what one of them stands for; and what has to be added to them so that none is negative.
    """
    largest = largest_input(x.device)
    if inputs == "dynamic":
        magnitude = x.detach().abs().amax(dims, keepdim=True).float().clamp_min(TINY * 127)
        return (x * (largest / magnitude)).round(), magnitude / largest, largest
    low, high = map(float, inputs)
    if in_bytes(x.device):  # which has no sign, so that no value need be left unused
        step = (high - low) / (2 * largest + 1)
        zero = round(-low / step)
        return (x / step).round().clamp(-zero, 2 * largest + 1 - zero), step, zero
    step = max(-low, high) / largest
    return (x / step).round().clamp(-largest, largest), step, largest


def convolve_as_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any
) -> Tensor:
    """``F.conv2d`` of images of one channel, as a product with their patches; what it gives has its channels last.

    Strides cannot tell where a single channel lies, so the compiler takes channels to be first, and then has to turn
    what comes out. oneDNN takes twice as long for such images, too.
    """
    images = x if x.dim() == 4 else x[None]
    size = convolved_size(images.shape[2:], weight.shape[2:], *map(pair, (stride, padding, dilation)))
    patches = F.unfold(images, weight.shape[2:], dilation, padding, stride)
    rows = F.linear(patches.transpose(1, 2).reshape(-1, patches.shape[1]), weight.flatten(1), bias)
    product = rows.view(len(images), *size, -1).permute(0, 3, 1, 2)
    return product if x.dim() == 4 else product[0]


def pair(value: Any) -> list[int]:
    """An option of a convolution for both dimensions."""
    return [value, value] if isinstance(value, int) else list(value)


class Int4Weight(PackedWeight):
    """Unsigned 4-bit integers, two in a byte, with a scale and a minimum in fp16 for each group of 32 elements.

    Groups run along the weight as it is laid out, with zeros at its end where it is no multiple of 32.

    Attributes:
        values: uint8, ``(groups, 16)``: the elements of a group in its low halves, then in its high halves.
        scale: fp16, ``(groups, 1)``.
        minimum: fp16, ``(groups, 1)``.
    """

    part_names = ("values", "scale", "minimum")
    values: Tensor  # type: ignore[assignment]
    scale: Tensor
    minimum: Tensor  # type: ignore[assignment]

    @classmethod
    def pack(cls, weight: Tensor, output_dim: int | tuple[int, ...] = 0, **_: Any) -> Self:
        """Round each element to the nearest of 16 levels between its group's extremes."""
        flat = weight.detach().float().flatten()
        groups = F.pad(flat, (0, -flat.numel() % GROUP)).view(-1, GROUP)
        minimum = groups.amin(1, keepdim=True).half()
        scale = ((groups.amax(1, keepdim=True) - minimum.float()) / 15).half().clamp_min(torch.finfo(torch.half).tiny)
        levels = ((groups - minimum.float()) / scale.float()).round().clamp(0, 15).to(torch.uint8)
        low, high = levels.chunk(2, dim=1)
        parts = {"values": low | (high << 4), "scale": scale, "minimum": minimum}
        return cls(parts, {}, weight.shape, weight.dtype)

    def well_formed(self) -> bool:
        """Whether there are groups for all elements and a scale and a minimum for each."""
        count = -(-self.numel() // GROUP)
        types = (self.values.dtype, self.scale.dtype, self.minimum.dtype) == (torch.uint8, torch.half, torch.half)
        return (
            types
            and self.values.shape == (count, GROUP // 2)
            and self.scale.shape == self.minimum.shape == (count, 1)
        )

    def dequantize(self) -> Tensor:
        """The levels that the integers stand for."""
        levels = torch.cat([self.values & 15, self.values >> 4], dim=1)
        flat = (levels * self.scale.float() + self.minimum.float()).flatten()
        return flat[: self.numel()].view(self.shape).to(self.dtype)

    def piece(self, index: Any) -> Tensor:
        """Unpack one matrix and no other, where it is whole groups."""
        return one_of_blocks(self, index, GROUP)
