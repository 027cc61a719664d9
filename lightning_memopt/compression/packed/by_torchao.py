"""Weights of linear maps as torchao's tensors, for its kernels on GPUs."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_memopt.compression.packed.base import PackedWeight

TORCHAO_SCHEMES = ("int8_weight_only", "int8_dynamic", "int4_weight_only", "fp8")
"""Schemes by which torchao holds weights as ours do: more of it, such as products of 8-bit floats, is not used."""

GROUP = 128
"""Inputs that share a scale in ``int4_weight_only``, torchao's default; it passes over other numbers of inputs."""


class TorchaoWeight(PackedWeight):
    """A matrix that torchao holds and multiplies; what else reads it sees the dense one, as of all packed weights.

    So torchao's tensors come to where its own filters do not: Hugging Face's ``Conv1D`` and
    ``nn.MultiheadAttention``.

    Attributes:
        held: torchao's tensor, of outputs by inputs.
        scheme: What it is packed by, which makes sense of its parts.
        output_dim: The dimension of the outputs: 1 where the weight is stored inputs by outputs.
    """

    part_names = ("held",)
    attribute_names = ("scheme", "output_dim")
    held: Tensor
    scheme: str
    output_dim: int

    @classmethod
    def pack(cls, weight: Tensor, output_dim: int | tuple[int, ...] = 0, **attributes: Any) -> Self:
        """Have torchao quantize ``weight`` by ``attributes["scheme"]``.

        Raises:
            ImportError: torchao is missing.
            ValueError: torchao has no kernels for ``scheme`` where ``weight`` is.
        """
        scheme = attributes["scheme"]
        matrix = weight.detach() if output_dim == 0 else weight.detach().t().contiguous()
        held = _quantized(matrix.to(_held_type(scheme, weight.dtype)), scheme)
        return cls({"held": held}, {"scheme": scheme, "output_dim": output_dim}, weight.shape, weight.dtype)

    def dequantize(self) -> Tensor:
        """The dense weight."""
        return self._matrix() if self.output_dim == 0 else self._matrix().t()

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """By torchao's kernel, in the type that it computes in."""
        return self._product(x, bias) if self.output_dim == 0 else super().linear(x, bias)

    def transposed_linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Likewise."""
        return self._product(x, bias) if self.output_dim == 1 else super().transposed_linear(x, bias)

    def transposed(self) -> Tensor:
        """The same tensor, read the other way."""
        attributes = {"scheme": self.scheme, "output_dim": 1 - self.output_dim}
        return type(self)({"held": self.held}, attributes, self.shape[::-1], self.dtype)

    @property
    def held_bytes(self) -> int:
        """Bytes in memory."""
        return sum(part.numel() * part.itemsize for part in self.file_parts().values())

    def map_parts(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Self:
        """The same weight with ``change`` done to each plain tensor of torchao's, which takes not all of them."""
        held = _rebuilt(self.held, {name: change(part) for name, part in self.file_parts().items()})
        return type(self)({"held": held}, self.attributes, self.shape, dtype or self.dtype)

    def file_parts(self) -> dict[str, Tensor]:
        """The plain tensors that torchao's is made of."""
        return {name: getattr(self.held, name) for name in self.held.__tensor_flatten__()[0]}  # type: ignore[attr-defined]

    @classmethod
    def from_file(cls, parts: Mapping[str, Tensor], attributes: Mapping[str, Any], shape: Any, dtype: Any) -> Self:
        """The weight whose parts these are.

        torchao packs zeros of that shape here, and its tensor takes the parts if they are of the same types and
        shapes: nothing else in a file decides how they are read.
        """
        scheme, output_dim = attributes["scheme"], attributes["output_dim"]
        if scheme not in TORCHAO_SCHEMES or output_dim not in (0, 1) or len(shape) != 2:
            raise ValueError(f"{dict(attributes)!r} is no way in which torchao holds weights")
        on_gpu = scheme == "int4_weight_only"  # whose order is that of kernels for GPUs
        if on_gpu and not torch.cuda.is_available():
            raise ValueError("torchao's 4 bits are in an order for CUDA, and there is no such GPU here")
        zeros = torch.zeros(shape, dtype=dtype, device="cuda" if on_gpu else "cpu")
        like = cls.pack(zeros, output_dim, scheme=scheme)
        for name, part in like.file_parts().items():
            if (parts[name].shape, parts[name].dtype) != (part.shape, part.dtype):
                raise ValueError(f"the installed torchao holds {name} otherwise")
        return cls({"held": _rebuilt(like.held, dict(parts))}, attributes, shape, dtype)

    def _matrix(self) -> Tensor:
        return self.held.dequantize().to(self.dtype)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not x.numel():  # for which it has no kernels
            return F.linear(x, self._matrix().to(x.dtype), bias)
        dtype = self.held.dtype
        return F.linear(x.to(dtype), self.held, None if bias is None else bias.to(dtype)).to(x.dtype)


def import_torchao() -> Any:
    """Its module for quantization.

    Raises:
        ImportError: torchao is missing.
    """
    try:
        from torchao import quantization
    except ImportError as error:
        raise ImportError(
            "engine='torchao' needs torchao, which is not installed; `pip install 'lightning-memopt[quantize]'`."
        ) from error
    return quantization


def _config(scheme: str) -> Any:
    quantization = import_torchao()
    if scheme == "int4_weight_only":
        return quantization.Int4WeightOnlyConfig(GROUP, int4_packing_format="tile_packed_to_4d")
    if scheme == "fp8":
        return quantization.Float8WeightOnlyConfig()
    if scheme == "int8_dynamic":
        return quantization.Int8DynamicActivationInt8WeightConfig(version=2)
    return quantization.Int8WeightOnlyConfig(version=2)


def _rebuilt(held: Any, parts: dict[str, Tensor]) -> Tensor:
    """torchao's tensor ``held`` of other plain tensors."""
    _, context = held.__tensor_flatten__()
    return type(held).__tensor_unflatten__(parts, context, None, None)


def _held_type(scheme: str, dtype: torch.dtype) -> torch.dtype:
    """What torchao can quantize: 4 bits of bf16 alone, and nothing of float64."""
    if scheme == "int4_weight_only":
        return torch.bfloat16
    return torch.float32 if dtype == torch.float64 else dtype


def _quantized(matrix: Tensor, scheme: str) -> Tensor:
    quantize_, config = import_torchao().quantize_, _config(scheme)
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.weight = nn.Parameter(matrix, requires_grad=False)
    try:
        with warnings.catch_warnings(action="ignore"):  # about the next torch's ways, which users cannot change
            quantize_(layer, config)
    except (AssertionError, ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"torchao cannot hold weights of {tuple(matrix.shape)} as {scheme!r} on {matrix.device.type} here "
            f"({type(error).__name__}: {error}). Leave engine='torchao' out, or take another scheme"
        ) from error
    return layer.weight.detach()
