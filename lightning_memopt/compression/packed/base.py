"""A weight that is held in fewer bytes and otherwise acts as the dense one."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from lightning_memopt.__about__ import __version__
from lightning_memopt.compression.packed.attention import apart

aten = torch.ops.aten

_VIEWS = {
    "view", "view_as", "unsqueeze", "squeeze", "t", "transpose", "swapaxes", "permute", "movedim", "expand",
    "expand_as", "chunk", "split", "tensor_split", "unbind", "__iter__", "narrow", "select", "diagonal", "unfold",
}  # fmt: skip
"""Operations, by the names of functions and of methods, that return views."""

TINY = torch.finfo(torch.float32).tiny
"""The smallest scale, of outputs that are all zero."""


Packed = TypeVar("Packed", bound="PackedWeight")


class PackedWeight(Tensor):
    """A read-only weight made of plain tensors, its *parts*, that any module can hold in place of a dense one.

    A subclass of tensor and no module, so that the modules of a model, what reads their attributes, and the ties
    between them, stay as they are: ``nn.Linear``, convolutions, ``nn.Embedding``, ``nn.MultiheadAttention`` and
    Hugging Face's ``Conv1D`` all work. Linear maps and look-ups are computed from the parts; any other operation sees
    the dense weight, made for it and dropped.

    Subclasses set ``part_names`` and ``attribute_names`` (JSON values) and define ``pack`` and ``dequantize``.
    """

    part_names: ClassVar[tuple[str, ...]]
    attribute_names: ClassVar[tuple[str, ...]] = ()

    def __new__(
        cls, parts: Mapping[str, Tensor], attributes: Mapping[str, Any], shape: Any, dtype: torch.dtype
    ) -> Self:
        """Wrap ``parts`` as a weight of ``shape`` and ``dtype``."""
        device = parts[cls.part_names[0]].device
        packed = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)
        for name in cls.part_names:
            setattr(packed, name, parts[name])
        for name in cls.attribute_names:
            setattr(packed, name, attributes[name])
        return packed

    @classmethod
    def pack(cls, weight: Tensor, output_dim: int | tuple[int, ...] = 0, **attributes: Any) -> Self:
        """Pack a dense ``weight`` whose outputs lie along ``output_dim``; of stacked matrices along two."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """The dense weight, of ``self.dtype``."""
        raise NotImplementedError

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + bias``; subclasses do better than to unpack the weight."""
        return F.linear(x, self.dequantize().to(x.dtype), bias)

    def transposed_linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W + bias`` for a matrix ``x``: what ``Conv1D`` computes."""
        weight = self.dequantize().to(x.dtype)
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    def transposed(self) -> Tensor:
        """The transposed matrix, packed where it can be."""
        return self.dequantize().t()

    def conv2d(self, x: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
        """The convolution of images ``x``."""
        return F.conv2d(x, self.dequantize().to(x.dtype), bias, stride, padding, dilation, groups)

    def rows(self, indices: Tensor) -> Tensor:
        """Rows of a matrix, as an embedding looks them up."""
        return self.dequantize()[indices]

    def piece(self, index: Any) -> Tensor:
        """One of the matrices that are stacked along the first dimension, packed where it can be."""
        return self.dequantize()[index]

    def well_formed(self) -> bool:
        """Whether the types and shapes of the parts fit the shape of the weight; kernels read beyond them else."""
        raise NotImplementedError

    def plain(self) -> "PackedWeight":
        """The same weight in the form that files have, whatever order this machine reads it in."""
        return self

    def file_parts(self) -> dict[str, Tensor]:
        """The plain tensors that files have of :meth:`plain`."""
        return self.parts

    @classmethod
    def from_file(
        cls, parts: Mapping[str, Tensor], attributes: Mapping[str, Any], shape: Any, dtype: torch.dtype
    ) -> Self:
        """The weight of which a file has these parts.

        Raises:
            ValueError: They do not fit it.
        """
        packed = cls(parts, attributes, shape, dtype)
        if not packed.well_formed():
            raise ValueError("its parts are not of its shape")
        return packed

    def fill(self, source: Tensor) -> None:
        """Take the values of ``source``, which is packed alike, or is the dense weight that this one stands for.

        Raises:
            ValueError: It is neither.
        """
        is_dense = type(source) is Tensor and (source.device, source.dtype) == (self.device, self.dtype)
        if is_dense and torch.equal(source, self.dequantize()):
            return  # of another replica: what DDP broadcasts is dense
        if type(source) is not type(self) or source.attributes != self.attributes:
            raise ValueError(
                f"A {type(self).__name__} cannot be filled from a {type(source).__name__}: its values are rounded. "
                "Load the weights before they are packed, or with `load_state_dict(..., assign=True)`."
            )
        for name, part in self.parts.items():
            part.copy_(getattr(source, name))

    @property
    def held_bytes(self) -> int:
        """Bytes in memory."""
        # No `nbytes`, which torch 2.11 cannot tell of parts whose shapes the compiler left open.
        return sum(part.numel() * part.itemsize for part in self.parts.values())

    @property
    def parts(self) -> dict[str, Tensor]:
        """The plain tensors that hold the weight."""
        return {name: getattr(self, name) for name in self.part_names}

    @property
    def attributes(self) -> dict[str, Any]:
        """What else is needed to make sense of the parts: values that JSON can hold."""
        return {name: getattr(self, name) for name in self.attribute_names}

    def map_parts(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Self:
        """The same weight with ``change`` done to each part."""
        parts = {name: change(part) for name, part in self.parts.items()}
        return type(self)(parts, self.attributes, self.shape, dtype or self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.part_names), (self.attributes, self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Self:
        attributes, dtype = context
        return cls(parts, attributes, size, dtype)

    def _stable_hash_for_caching(self) -> str:
        """What the compiler's cache on disk knows graphs with this weight by; torch asks for it.

        The version is a part of it, since such a graph holds the operators that this version's methods ran.
        """
        parts = [(each.shape, each.stride(), each.dtype, each.device) for each in self.parts.values()]
        described = (
            type(self).__qualname__,
            __version__,
            self.shape,
            self.dtype,
            self.requires_grad,
            self.attributes,
        )
        return hashlib.blake2b(repr((*described, parts)).encode(), digest_size=16).hexdigest()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # What torch would write is read neither with `weights_only=True` nor by Lightning, which maps locations.
        plain = self.plain()
        described = (plain.file_parts(), plain.attributes, tuple(plain.shape), plain.dtype)
        return unpickled, (type(plain), *described, isinstance(self, Parameter))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, bytes={stored_bytes(self)})"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.linear:
            return _linear(*args, **kwargs)
        if function is F.embedding:
            return _embedding(*args, **kwargs)
        if function in (torch.addmm, Tensor.addmm) and not kwargs and isinstance(args[2], PackedWeight):
            return args[2].transposed_linear(args[1], args[0])
        if function is F.conv2d:
            return _conv2d(*args, **kwargs)
        if function is Tensor.__getitem__ and args[0].dim() > 2 and _is_number(args[1]):
            return args[0].piece(args[1])
        if function is F.embedding_bag:
            # Within it rows beyond `max_norm` are shortened in their table: one table has to last for all of it.
            with torch._C.DisableTorchFunctionSubclass():
                return function(*dense(args), **dense(kwargs))
        if function is Tensor.__getitem__ or (
            function is F.multi_head_attention_forward and not attends_to_itself(*args)
        ):
            # One cuts its weight in three: better once here than at each cut. A part of a weight (positions up to
            # the length) would be a view, and views of a wrapper do not exist in inference mode.
            args, kwargs = dense((args, kwargs))
        elif torch.is_inference_mode_enabled() and getattr(function, "__name__", "") in _VIEWS:
            args, kwargs = dense((args, kwargs))  # likewise
        elif torch.is_inference_mode_enabled() and function is Tensor.detach:
            return args[0].map_parts(Tensor.detach)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (aten.detach.default, aten.alias.default, aten.clone.default, aten.contiguous.default):
            return args[0].map_parts(function)
        if function is aten._to_copy.default:
            # Parts have types of their own: a change of type is only that of what they stand for.
            moved = {key: kwargs[key] for key in ("device", "non_blocking") if key in kwargs}
            weight = args[0].plain() if "device" in moved else args[0]
            return weight.map_parts(lambda part: part.to(copy=True, **moved), kwargs.get("dtype"))
        if function is aten.copy_.default and isinstance(args[0], PackedWeight):
            args[0].fill(args[1])
            return args[0]
        # Within attention, which calls no functions that are seen above, linear maps come in these forms.
        if function is aten.t.default:
            return args[0].transposed()
        if function is aten.linear.default:
            return _linear(*args, **kwargs)
        if function is aten.mm.default and isinstance(args[1], PackedWeight):
            return args[1].transposed_linear(dense(args[0]), None)
        if function is aten.addmm.default and not kwargs and isinstance(args[2], PackedWeight):
            return args[2].transposed_linear(dense(args[1]), args[0])
        computed = apart(function, args, kwargs, _linear)
        if computed is not NotImplemented:
            return computed
        args, kwargs = dense((args, kwargs))
        return function(*args, **kwargs)


def unpickled(
    cls: type[PackedWeight],
    parts: dict[str, Tensor],
    attributes: dict[str, Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    is_parameter: bool,
) -> Tensor:
    """The weight that was pickled.

    Raises:
        ValueError: Its parts do not fit it.
    """
    packed = cls.from_file(parts, attributes, shape, dtype)
    return Parameter(packed, requires_grad=False) if is_parameter else packed


def one_of_stack(weight: Packed, index: Any) -> Packed:
    """One of the stacked matrices of a weight whose parts are of its shape, or 1 long where they are shared."""
    parts = {name: part[0 if len(part) == 1 else index] for name, part in weight.parts.items()}
    return type(weight)(parts, weight.attributes, weight.shape[1:], weight.dtype)


def one_of_blocks(weight: PackedWeight, index: Any, block: int) -> Tensor:
    """One of the stacked matrices of a weight whose parts have a row for so many elements, or for two."""
    count, shape = len(weight), weight.shape[1:]
    if shape.numel() % block:
        return weight.dequantize()[index]
    parts = {name: part.view(count, -1, *part.shape[1:])[index] for name, part in weight.parts.items()}
    return type(weight)(parts, weight.attributes, shape, weight.dtype).dequantize()


def dense(tree: Any) -> Any:
    """``tree`` (nested containers, tensors) with every packed weight unpacked."""
    return tree_map_only(PackedWeight, lambda weight: weight.dequantize(), tree)


def stored_bytes(tensor: Tensor) -> int:
    """The bytes that ``tensor`` takes: those of its parts where it is packed."""
    return tensor.held_bytes if isinstance(tensor, PackedWeight) else tensor.nbytes


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, PackedWeight):
        return weight.linear(dense(input), dense(bias))
    return F.linear(dense(input), weight, dense(bias))


def _conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    if isinstance(weight, PackedWeight):
        return weight.conv2d(dense(input), dense(bias), stride, padding, dilation, groups)
    return F.conv2d(dense(input), weight, dense(bias), stride, padding, dilation, groups)


def _is_number(index: Any) -> bool:
    is_tensor = type(index) is Tensor and index.dim() == 0 and not index.is_floating_point()
    return type(index) is int or (is_tensor and index.dtype != torch.bool)


def attends_to_itself(query: Any, key: Any = None, value: Any = None, *_: Any, **__: Any) -> bool:
    """Whether a call of attention is of a sequence with itself: then weights are read whole, and inputs rounded."""
    return query is key and key is value


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, *unused: Any, **also_unused: Any,
) -> Tensor:  # fmt: skip
    # Padding, scaling and sparsity are about gradients, and there are none.
    if not isinstance(weight, PackedWeight):
        return F.embedding(dense(input), weight, padding_idx, max_norm, norm_type)
    rows = weight.rows(input)
    if max_norm is None:
        return rows
    # Torch shortens the rows within the table, which cannot be written to; the small number is torch's.
    norms = rows.norm(norm_type, dim=-1, keepdim=True)
    return rows * (max_norm / (norms + 1e-7)).clamp(max=1)
