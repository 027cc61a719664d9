"""Integers held in the order in which oneDNN's kernels read them, and in no other.

Bringing a weight into that order takes longer than many of the products, and holding it in both forms would take its
bytes twice. So it is held as the kernels read it, and brought back, exactly, for files and whatever else reads it.
"""

from collections.abc import Mapping
from itertools import count
from typing import Any, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_memopt.compression.packed.base import PackedWeight
from lightning_memopt.compression.packed.hardware import SMALLEST, convolved_size, in_bytes
from lightning_memopt.compression.packed.integers import FEWEST, Inputs, Int8Weight, as_rows, pair, round_inputs
from lightning_memopt.models.fake import is_fake

MOST_FILLED = 1.15
"""How much larger a weight may be in the kernels' order, which fills its dimensions up: to 64 with AVX-512."""

_ordered: WeakValueDictionary[int, "Ordered"] = WeakValueDictionary()
_keys = count()


class Ordered:
    """An int8 matrix ``(out, in)``, or filters ``(out, in, height, width)``, in the kernels' order.

    That is a tensor of oneDNN's own, which compilers cannot look into: they, and operators, know it by its number.

    Attributes:
        tensor: oneDNN's.
        nbytes: Its bytes; oneDNN fills channels up to multiples of 8 to 64.
        key: Its number, for as long as something holds it.
    """

    def __init__(self, values: Tensor) -> None:
        if values.dim() == 2:
            self.tensor = torch.ops.onednn.qlinear_prepack(values, None)
        else:
            some_images = [32, values.shape[1], 32, 32]  # the order is the same for all sizes
            self.tensor = torch.ops.onednn.qconv_prepack(
                values, torch.ones(1), 1.0, 0, [1, 1], [0, 0], [1, 1], 1, some_images
            )
        self.nbytes: int = torch.ops.mkldnn._nbytes(self.tensor)
        self.key = next(_keys)
        _ordered[self.key] = self

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # nothing changes it


class OrderedInt8Weight(Int8Weight):
    """An :class:`Int8Weight`, with rounded inputs, whose integers are in the order that oneDNN's kernels read.

    Attributes:
        scale: As there.
        sums: Of the integers of each output, fp32: what a zero that is not at 0 adds to it.
        ordered: The integers.
        is_transposed: The weight is stored (in, out).
    """

    part_names = ("scale", "sums")
    attribute_names = ("inputs", "key", "is_transposed")
    inputs: Inputs
    sums: Tensor
    ordered: Ordered
    key: int
    is_transposed: bool

    def __new__(
        cls, parts: Mapping[str, Tensor], attributes: Mapping[str, Any], shape: Any, dtype: torch.dtype
    ) -> Self:
        """Take the integers of ``attributes["key"]``."""
        weight = super().__new__(cls, parts, attributes, shape, dtype)
        weight.ordered = _ordered[weight.key]
        return weight

    @classmethod
    def order(cls, weight: Int8Weight, *, is_transposed: bool = False) -> Self:
        """The same weight with its integers in order."""
        values = weight.values.t().contiguous() if is_transposed else weight.values
        ordered = Ordered(values)
        sums = values.sum(tuple(range(1, values.dim()))).float()
        attributes = {"inputs": weight.inputs, "key": ordered.key, "is_transposed": is_transposed}
        return cls({"scale": weight.scale, "sums": sums}, attributes, weight.shape, weight.dtype)

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """The integers in the usual order, made anew at each call."""
        values = torch.ops.lightning_memopt.usual_order(self.sums, self.key)
        return values.t() if self.is_transposed else values

    def plain(self) -> Int8Weight:
        """The weight with its integers in the usual order."""
        parts = {"values": self.values.contiguous(), "scale": self.scale}
        return Int8Weight(parts, {"inputs": self.inputs}, self.shape, self.dtype)

    def fill(self, source: Tensor) -> None:
        """Take the values of ``source``, in whichever order it has them."""
        plain, given = self.plain(), source.plain() if isinstance(source, PackedWeight) else source
        plain.fill(given)
        new = self.order(plain, is_transposed=self.is_transposed)
        self.ordered, self.key, self.sums = new.ordered, new.key, new.sums

    @property
    def held_bytes(self) -> int:
        """Bytes in memory."""
        return super().held_bytes + self.ordered.nbytes

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply by the integers and scale the result."""
        integers, step, zero = round_inputs(as_rows(x), self.inputs, (1,))
        product = torch.ops.lightning_memopt.multiply_ordered((integers + zero).to(torch.uint8), self.key)
        product = (product - zero * self.sums) * step * self.scale.view(1, -1)
        product = product.reshape(*x.shape[:-1], product.shape[-1]).to(x.dtype)
        return product if bias is None else product + bias

    def transposed_linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As :meth:`linear`: the order is the same."""
        return self.linear(x, bias)

    def transposed(self) -> Self:
        """The transposed matrix; nothing is copied."""
        parts = {"scale": self.scale.t(), "sums": self.sums}
        attributes = {**self.attributes, "is_transposed": not self.is_transposed}
        return type(self)(parts, attributes, self.shape[::-1], self.dtype)

    def conv2d(self, x: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
        """Convolve integers and scale the result."""
        images = x if x.dim() == 4 else x[None]
        integers, step, zero = round_inputs(images, self.inputs, (1, 2, 3))
        integers = (integers + zero).to(torch.uint8).contiguous(memory_format=torch.channels_last)
        product = torch.ops.lightning_memopt.convolve_ordered(
            integers, self.key, zero, *map(pair, (stride, padding, dilation))
        )
        product = (product - zero * self.sums.view(-1, 1, 1)) * (step * self.scale.view(-1, 1, 1))
        product = product.to(x.dtype) if bias is None else product.to(x.dtype) + bias.view(-1, 1, 1)
        return product if x.dim() == 4 else product[0]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, (self.plain(), self.is_transposed, isinstance(self, nn.Parameter))


def in_order(packed: PackedWeight, module: nn.Module, output_dim: int) -> PackedWeight:
    """``packed`` in the order that kernels of this machine read, or as it is if that gains nothing.

    Args:
        packed: A weight.
        module: What multiplies by it; not an embedding, which looks up its rows.
        output_dim: The dimension of its outputs.
    """
    if type(packed) is not Int8Weight or packed.inputs is None or not in_bytes(packed.device):
        return packed
    has_scales = packed.scale.numel() in (1, packed.scale.shape[output_dim])
    if is_fake(packed.values) or packed.numel() < SMALLEST or not has_scales:
        return packed
    if packed.dim() > 2:
        if not isinstance(module, nn.Conv2d) or module.groups != 1 or isinstance(module.padding, str):
            return packed
        if packed[0].numel() < FEWEST:
            return packed
    ordered = OrderedInt8Weight.order(packed, is_transposed=packed.dim() == 2 and output_dim == 1)
    return ordered if ordered.held_bytes <= MOST_FILLED * packed.held_bytes else packed


def _unpickled(weight: Int8Weight, is_transposed: bool, is_parameter: bool) -> Tensor:
    if in_bytes(weight.device):
        weight = OrderedInt8Weight.order(weight, is_transposed=is_transposed)
    return nn.Parameter(weight, requires_grad=False) if is_parameter else weight


torch.serialization.add_safe_globals([_unpickled])

# Operators, since the compiler cannot look into tensors in that order. The plain kind, which takes 20 µs less a call
# than `torch.library.custom_op`.

_library = torch.library.Library("lightning_memopt", "FRAGMENT")
_library.define("multiply_ordered(Tensor inputs, int key) -> Tensor")
_library.define(
    "convolve_ordered(Tensor inputs, int key, int zero, int[] stride, int[] padding, int[] dilation) -> Tensor"
)
_library.define("usual_order(Tensor sums, int key) -> Tensor")
_ONE, _ZERO = torch.ones(1), torch.zeros(1, dtype=torch.int32)
_AS_FLOATS: Any = (1.0, 0, torch.float32, "none", [], "")


def _multiply(inputs: Tensor, key: int) -> Tensor:
    weight = _ordered[key].tensor
    return torch.ops.onednn.qlinear_pointwise(inputs, 1.0, 0, weight, _ONE, _ZERO, None, *_AS_FLOATS)


def _convolve(
    inputs: Tensor, key: int, zero: int, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    weight = _ordered[key].tensor
    if zero and any(padding):  # quicker than to tell the kernel what stands for zero
        inputs = F.pad(inputs, (padding[1], padding[1], padding[0], padding[0]), value=zero)
        padding = [0, 0]
    return torch.ops.onednn.qconv_pointwise(
        inputs, 1.0, 0, weight, _ONE, _ZERO, None, stride, padding, dilation, 1, *_AS_FLOATS
    )


def _usual_order(sums: Tensor, key: int) -> Tensor:
    values = _ordered[key].tensor.to_dense()
    return values.t().contiguous() if values.dim() == 2 else values  # oneDNN's matrices are (in, out)


_library.impl("multiply_ordered", _multiply, "CPU")
_library.impl("convolve_ordered", _convolve, "CPU")
_library.impl("usual_order", _usual_order, "CPU")


@torch.library.register_fake("lightning_memopt::multiply_ordered", lib=_library)
def _(inputs: Tensor, key: int) -> Tensor:
    return inputs.new_empty(inputs.shape[0], _ordered[key].tensor.shape[1], dtype=torch.float32)


@torch.library.register_fake("lightning_memopt::convolve_ordered", lib=_library)
def _(inputs: Tensor, key: int, zero: int, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    outputs, _inputs, *kernel = _ordered[key].tensor.shape
    size = convolved_size(inputs.shape[2:], kernel, stride, padding, dilation)
    shape = (inputs.shape[0], outputs, *size)
    return inputs.new_empty(shape, dtype=torch.float32).to(memory_format=torch.channels_last)


@torch.library.register_fake("lightning_memopt::usual_order", lib=_library)
def _(sums: Tensor, key: int) -> Tensor:
    shape = _ordered[key].tensor.shape
    return sums.new_empty(shape[::-1] if len(shape) == 2 else shape, dtype=torch.int8)
