"""Logits that are a promise: a linear layer that puts off its product until a cross-entropy asks for it.

Whether the loss is inside a model or in the user's step, the way from the final linear layer to the cross-entropy
is a few views, casts, scalings and perhaps a bias. :func:`lazy_logits` makes the layer return an object that follows
them and hands :func:`torch.nn.functional.cross_entropy` what it needs to compute in chunks. Anything else raises.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lightning_memopt.techniques.chunked_loss import chunked_cross_entropy_of_transformed_logits


class LogitsNotFormedError(AttributeError, RuntimeError):
    """Something other than a cross-entropy asked for logits that chunking does not form.

    An ``AttributeError`` too, so that ``hasattr`` answers instead of failing.
    """


@contextmanager
def lazy_logits(head: nn.Module, name: str = "head") -> Iterator[None]:
    """Let ``head`` return lazy logits while gradients are enabled; without them it computes as always.

    The patch is on the instance and undone on exit.

    Args:
        head: The final linear layer, an ``nn.Linear``.
        name: Its qualified name, for error messages.

    Raises:
        ValueError: ``head`` is not a plain ``nn.Linear``, or its ``forward`` is already replaced on the instance.

    Example:
        >>> head, hidden = nn.Linear(8, 100), torch.randn(2, 5, 8)
        >>> with lazy_logits(head):
        ...     loss = F.cross_entropy(head(hidden).flatten(0, 1), torch.zeros(10, dtype=torch.long))
        >>> loss.backward()
    """
    is_split = isinstance(head, nn.Linear) and isinstance(head.weight, DTensor)  # tensor parallel: another class
    if type(head) is not nn.Linear and not is_split:
        raise ValueError(
            f"{name} is a {type(head).__name__}, whose product with the hidden states chunking cannot repeat; it "
            "must be a plain nn.Linear. Call memopt.chunked_cross_entropy(hidden, weight, target) yourself instead."
        )
    if "forward" in vars(head):
        raise ValueError(
            f"The forward of {name} is already replaced on the instance, so chunking would drop that replacement; "
            "remove it, or a second ChunkedLoss for the same layer."
        )
    original = head.forward

    def forward(hidden: torch.Tensor) -> Any:
        if not torch.is_grad_enabled():
            return original(hidden)
        return LazyLogits(hidden, _whole(head.weight), _whole(head.bias), name)

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def _whole(parameter: Any) -> Any:
    """The whole of a split parameter for the length of a step; of the gradient each rank keeps its part."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


class LazyLogits:
    """Stands for ``gain * tanh(scale * (hidden @ weight.T + bias))``, without gain and tanh where the gain is None.

    Supports what lies between a final linear layer and its loss: views, casts and contiguity, slices of all but the
    class dimension, that dimension moved second, a number added to each class, scaling and soft-capping by numbers.
    Neither a tensor nor a dataclass: what walks through a step's outputs takes it for a leaf.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> None:
        self.hidden = hidden
        self.weight = weight
        self.bias = bias
        self.name = name
        self.scale = 1.0
        self.tanh_gain: float | None = None
        self.classes_second = False

    def _with(self, **changes: Any) -> "LazyLogits":
        changed = object.__new__(LazyLogits)
        changed.__dict__.update(self.__dict__, **changes)
        return changed

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.cross_entropy:
            return _cross_entropy(*args, **(kwargs or {}))
        name = getattr(function, "__name__", str(function))
        method = _TORCH_FUNCTIONS.get(name)
        logits = next((arg for arg in args if isinstance(arg, cls)), None)
        if logits is None or method is None or args[0] is not logits:
            source = logits.name if logits is not None else "the final linear layer"
            raise LogitsNotFormedError(_used_by(name, source))
        return getattr(logits, method)(*args[1:], **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        raise LogitsNotFormedError(_used_by(name, self.name))

    @property
    def shape(self) -> torch.Size:
        """Shape that the logits would have."""
        *leading, last = (*self.hidden.shape[:-1], self.weight.shape[0])
        return torch.Size([leading[0], last, *leading[1:]] if self.classes_second else [*leading, last])

    @property
    def device(self) -> torch.device:
        """Device that the logits would be on."""
        return self.hidden.device

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.hidden.dim()

    @property
    def requires_grad(self) -> bool:
        """Whether the logits would carry a gradient."""
        return self.hidden.requires_grad or self.weight.requires_grad

    def dim(self) -> int:
        """Number of dimensions."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """Shape, or the size of one dimension."""
        return self.shape if dim is None else self.shape[dim]

    def float(self) -> "LazyLogits":
        """Cast to float32, in which the loss is computed anyway."""
        return self

    def contiguous(self) -> "LazyLogits":
        """Nothing to lay out."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> "LazyLogits":
        """Accept a cast or a move to the device that the hidden states are on."""
        for value in (*args, *kwargs.values()):
            is_device = isinstance(value, torch.device | str)
            if is_device and torch.device(value).type != self.device.type:
                raise LogitsNotFormedError(_used_by(f"to({value})", self.name))
        return self

    def view(self, *sizes: Any) -> "LazyLogits":
        """Reshape all but the class dimension, which must stay last."""
        shape = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        tokens = math.prod(self.hidden.shape[:-1])
        keeps_classes = shape[-1] == self.shape[-1] or (shape[-1] == -1 and math.prod(shape[:-1]) == tokens)
        self._require(not self.classes_second and keeps_classes, f"view{shape}")
        return self._with(hidden=self.hidden.reshape(*shape[:-1], self.hidden.shape[-1]))

    reshape = view

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> "LazyLogits":
        """Flatten dimensions before the class dimension."""
        self._require(
            not self.classes_second and end_dim % self.ndim < self.ndim - 1, f"flatten({start_dim}, {end_dim})"
        )
        return self._with(hidden=self.hidden.flatten(start_dim, end_dim))

    def squeeze(self, dim: int) -> "LazyLogits":
        """Drop a dimension of size 1 before the class dimension."""
        self._require(not self.classes_second and dim % self.ndim < self.ndim - 1, f"squeeze({dim})")
        return self._with(hidden=self.hidden.squeeze(dim))

    def transpose(self, first: int, second: int) -> "LazyLogits":
        """Move the class dimension of ``(batch, tokens, classes)`` second, where ``F.cross_entropy`` looks for it."""
        dims = {first % self.ndim, second % self.ndim}
        self._require(self.ndim == 3 and dims == {1, 2}, f"transpose({first}, {second})")
        return self._with(classes_second=not self.classes_second)

    def permute(self, *dims: Any) -> "LazyLogits":
        """As :meth:`transpose`, for the order ``(0, 2, 1)``."""
        order = tuple(dims[0]) if len(dims) == 1 else dims
        self._require(tuple(d % self.ndim for d in order) == (0, 2, 1), f"permute{order}")
        return self.transpose(1, 2)

    def tanh(self) -> "LazyLogits":
        """The bend of a soft cap."""
        self._require(self.tanh_gain is None, "a second tanh")
        return self._with(tanh_gain=1.0)

    def __getitem__(self, index: Any) -> "LazyLogits":
        self._require(not self.classes_second and _keeps_last_dimension(index, self.ndim), f"the index {index}")
        return self._with(hidden=self.hidden[index])

    def __add__(self, other: Any) -> "LazyLogits":
        is_tensor = isinstance(other, torch.Tensor)
        is_bias = is_tensor and other.shape[-1:] == self.weight.shape[:1] and other.numel() == other.shape[-1]
        self._require(
            is_bias and self.tanh_gain is None and not self.classes_second,
            f"addition of a {type(other).__name__}{list(other.shape) if is_tensor else ''}",
        )
        added = other.reshape(-1) / self.scale
        return self._with(bias=added if self.bias is None else self.bias + added)

    def __mul__(self, factor: Any) -> "LazyLogits":
        self._require(isinstance(factor, int | float), f"multiplication by a {type(factor).__name__}")
        if self.tanh_gain is not None:
            return self._with(tanh_gain=self.tanh_gain * factor)
        return self._with(scale=self.scale * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> "LazyLogits":
        self._require(isinstance(divisor, int | float), f"division by a {type(divisor).__name__}")
        return self * (1 / divisor)

    def _require(self, is_possible: bool, operation: str) -> None:
        if not is_possible:
            raise LogitsNotFormedError(_used_by(operation, self.name))


def _unsupported(operation: str) -> Callable[..., Any]:
    def method(self: LazyLogits, *args: Any) -> Any:
        raise LogitsNotFormedError(_used_by(operation, self.name))

    return method


# Python looks operators up on the class, past __getattr__: each is named so that its error is ours.
for _operator in (
    "radd", "sub", "rsub", "rtruediv", "matmul", "rmatmul", "pow", "neg", "abs", "eq", "ne", "lt", "le",
    "gt", "ge", "len", "iter", "float", "int", "bool", "setitem",
):  # fmt: skip
    setattr(LazyLogits, f"__{_operator}__", _unsupported(f"__{_operator}__"))

_TORCH_FUNCTIONS = {
    "add": "__add__", "div": "__truediv__", "flatten": "flatten", "mul": "__mul__", "permute": "permute",
    "reshape": "reshape", "squeeze": "squeeze", "tanh": "tanh", "transpose": "transpose",
}  # fmt: skip
"""``torch.<function>`` spellings of the methods above."""


def _cross_entropy(
    input: LazyLogits,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """What ``F.cross_entropy`` does, from lazy logits; its arguments, its names."""
    input._require(weight is None, "cross_entropy with class weights")
    input._require(size_average is None and reduce is None, "cross_entropy with size_average or reduce")
    input._require(reduction in ("mean", "sum"), f"cross_entropy with reduction={reduction!r}")
    input._require(input.ndim <= 2 or input.classes_second, f"cross_entropy over dimension 1 of {tuple(input.shape)}")
    return chunked_cross_entropy_of_transformed_logits(
        input.hidden, input.weight, target, bias=input.bias, ignore_index=ignore_index,
        label_smoothing=label_smoothing, reduction=reduction, scale=input.scale, tanh_gain=input.tanh_gain,
    )  # fmt: skip


def _keeps_last_dimension(index: Any, ndim: int) -> bool:
    entries = index if isinstance(index, tuple) else (index,)
    if entries[-1] is Ellipsis:
        return _consumed(entries) < ndim
    if isinstance(entries[-1], slice) and entries[-1] == slice(None):
        return True
    return not any(entry is Ellipsis for entry in entries) and _consumed(entries) < ndim


def _consumed(entries: tuple[Any, ...]) -> int:
    """How many dimensions an index consumes; a boolean mask consumes as many as it has."""
    return sum(
        entry.dim() if isinstance(entry, torch.Tensor) and entry.dtype is torch.bool else 1
        for entry in entries
        if entry is not None and entry is not Ellipsis
    )


def _used_by(operation: str, name: str) -> str:
    return (
        f"The logits of {name} were used by {operation}, but ChunkedLoss does not form them in training: only a mean "
        "or summed cross_entropy of them is possible. Compute metrics in validation_step, where logits are as ever, "
        "or call memopt.chunked_cross_entropy(hidden, weight, target) yourself and leave ChunkedLoss away."
    )
