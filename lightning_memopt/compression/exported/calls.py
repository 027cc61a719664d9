"""Record what the parts of a module are called with: shapes and types, as JSON holds them, and no values."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from lightning_memopt.models.compiled import run_uncompiled

Inputs = Any
"""Arguments as JSON: ``{"tensor": [type, shape]}``, ``{"tuple": [...]}``, ``{"list": [...]}``, ``{"dict": {...}}``,
and plain numbers, texts and ``None`` as they are. Of a call: ``[positional, named]``."""

TYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


@dataclass
class Calls:
    """The calls of one module.

    Attributes:
        inputs: What its largest call took; ``None``: a call took what no file holds.
        varying: Dimensions of its tensors that are not the same in all calls: which tensor, which dimension.
        within: Modules that were running at each of its calls, by name.
        computes_loss: Whether a call returned a floating-point number without dimensions.
        reason: Why no graph takes all of the calls; empty where one may.
    """

    inputs: Inputs
    varying: set[tuple[int, int]] = field(default_factory=set)
    within: set[str] = field(default_factory=set)
    computes_loss: bool = False
    reason: str = ""

    def add(self, inputs: Inputs, within: Iterable[str]) -> None:
        """Take one more call into account."""
        self.within &= set(within)
        (old, kinds), (new, other_kinds) = _take_apart(self.inputs), _take_apart(inputs)
        if kinds != other_kinds:
            self.reason = self.reason or "it is called with other kinds of arguments at times"
            return
        self.varying |= {
            (index, dim)
            for index, (one, other) in enumerate(zip(old, new, strict=True))
            for dim, (size, another) in enumerate(zip(one, other, strict=True))
            if size != another
        }
        if sum(map(prod, new)) > sum(map(prod, old)):
            self.inputs = inputs


@contextmanager
def record_calls(module: nn.Module) -> Iterator[dict[str, Calls]]:
    """Collect, while the block runs, what the modules below ``module`` are called with.

    Yields:
        By qualified name; filled as modules are called.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> with record_calls(net) as calls:
        ...     _ = net(torch.ones(3, 4))
        >>> calls["0"].inputs
        [{'tuple': [{'tensor': ['float32', [3, 4]]}]}, {'dict': {}}]
    """
    calls: dict[str, Calls] = {}
    running: list[str] = []
    handles = []
    for name, part in module.named_modules():

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str = name) -> None:
            try:
                inputs, reason = [write_inputs(args), write_inputs(dict(kwargs))], ""
            except ValueError as error:
                inputs, reason = None, str(error)
            if name in calls:
                calls[name].add(inputs, running)
            else:
                calls[name] = Calls(inputs, within=set(running), reason=reason)
            running.append(name)

        def leave(_: nn.Module, args: Any, outputs: Any, name: str = name) -> None:
            running.pop()
            calls[name].computes_loss |= any(
                isinstance(leaf, Tensor) and leaf.dim() == 0 and leaf.is_floating_point()
                for leaf in tree_leaves(outputs)
            )

        handles.append(part.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(part.register_forward_hook(leave, always_call=True))
    try:
        with run_uncompiled(module):
            yield calls
    finally:
        for handle in handles:
            handle.remove()


def write_inputs(value: Any) -> Inputs:
    """``value``, arguments of a call, as JSON.

    Raises:
        ValueError: It has something else than tensors, plain values, lists, tuples and mappings by text.
    """
    if type(value) in (Tensor, nn.Parameter) and str(value.dtype).removeprefix("torch.") in TYPES:
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if type(value) in (tuple, list):
        return {type(value).__name__: [write_inputs(item) for item in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: write_inputs(item) for key, item in value.items()}}
    raise ValueError(f"it is called with a {type(value).__name__}, which no file holds")


def read_inputs(inputs: Inputs, device: str = "cpu") -> Any:
    """Arguments as :func:`write_inputs` was given, with tensors of any values: memory that is never touched.

    Raises:
        ValueError: ``inputs`` is nothing that it wrote.
    """
    if inputs is None or type(inputs) in (bool, int, float, str):
        return inputs
    if not isinstance(inputs, dict) or len(inputs) != 1:
        raise ValueError(f"{inputs!r} is no argument")
    ((kind, value),) = inputs.items()
    if kind == "dict" and isinstance(value, dict):
        return {key: read_inputs(item, device) for key, item in value.items()}
    if not isinstance(value, list):
        raise ValueError(f"{inputs!r} is no argument")
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(read_inputs(item, device) for item in value)
    dtype, shape = value if len(value) == 2 else ("", [])
    is_shape = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if kind != "tensor" or not isinstance(dtype, str) or dtype not in TYPES or not is_shape:
        raise ValueError(f"{inputs!r} is no argument")
    return torch.empty(shape, dtype=TYPES[dtype], device=device)


def _take_apart(inputs: Inputs) -> tuple[list[torch.Size], Any]:
    """The sizes of the tensors in ``inputs``, in order, and all that is left without them."""
    leaves, structure = tree_flatten([read_inputs(item, "meta") for item in inputs or ()])
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    kinds = [(leaf.dtype, leaf.dim()) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves]
    return [tensor.shape for tensor in tensors], (structure, kinds)
