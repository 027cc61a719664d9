"""Cut units off the tensors of a module, and see whether its code runs with what is left."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from lightning_memopt.compression.graph import Call, output_tensors
from lightning_memopt.compression.model_config import is_model_config
from lightning_memopt.compression.slots import UnitGroup

_WIDTH_NAMES = ("dim", "size", "width", "features", "channels", "hidden", "embed", "d_model", "inner")
_NO_WIDTHS = (
    "vocab",
    "image",
    "patch",
    "block_size",
    "head_size",
    "head_dim",
    "dim_head",
    "kernel",
    "chunk",
    "batch",
)


Kept = list[tuple[UnitGroup, Tensor]]
"""Groups of units, and a mask of those that are kept of each."""


class Trials:
    """Makes a module smaller and runs it, to see what its code bears.

    Args:
        module: The module.
        call: Runs it.
    """

    def __init__(self, module: nn.Module, call: Call) -> None:
        self._module, self._call = module, call
        self._shapes = _output_shapes(module, call)

    def most_that_run(self, good: Kept, more: Kept, failed: dict[str, str]) -> Kept:
        """``good``, which runs, and as many of ``more`` as run with it; why others do not goes to ``failed``."""
        way, error = self._try([*good, *more])
        if way is not None:
            return [*good, *more]
        if len(more) == 1:
            failed[more[0][0].name] = error
            return good
        # By kinds first: code may read a number of heads for all attentions, and the width follows the heads.
        kinds = [[one for one in more if one[0].kind == kind] for kind in ("channels", "heads", "width")]
        parts = [part for part in kinds if part]
        if len(parts) == 1:
            parts = [more[: len(more) // 2], more[len(more) // 2 :]]
        for part in parts:
            good = self.most_that_run(good, part, failed)
        return good

    def make(self, kept: Kept) -> dict[Tensor, "Smaller"]:
        """Make the module smaller for good; it runs so."""
        way, _ = self._try(kept)
        assert way is not None
        return _apply(self._module, kept, way, _Undo())

    def runs(self) -> bool:
        """Whether the module as it is now gives out tensors of the shapes that it had."""
        try:
            return _output_shapes(self._module, self._call) == self._shapes
        except Exception:
            return False

    def _try(self, kept: Kept) -> tuple["Numbers | None", str]:
        """The integers to set with which the smaller module runs, or why it runs with none; all is put back."""
        first = ""
        for numbers in _ways(self._module, kept):
            undo = _Undo()
            try:
                _apply(self._module, kept, numbers, undo)
                if _output_shapes(self._module, self._call) == self._shapes:
                    return numbers, ""
                error = "RuntimeError: its outputs have another shape"
            except Exception as raised:
                error = f"{type(raised).__name__}: {str(raised).splitlines()[0] if str(raised) else ''}"
            finally:
                undo.run()
            first = first or error
        return None, first


Numbers = list[tuple[Any, str, Any]]
"""Attributes of modules, or of configs that they read, and what they are to be."""


def _ways(module: nn.Module, kept: Kept) -> Iterator[Numbers]:
    """What to set integers that code reads to, to be tried in order: counts of heads first, since heads keep size."""
    ways = list(_ways_of_modules(module, kept))
    yield from ways
    # Last, since a config speaks of every layer, those that stay whole too.
    of_configs = list(_counts_of_configs(module, kept))
    if of_configs:
        yield from ([*way, *of_configs] for way in ways)


def _counts_of_configs(module: nn.Module, kept: Kept) -> Iterator[tuple[Any, str, int]]:
    """Counts of heads in configs, where all attentions that have so many keep the same number."""
    left: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for group, mask in kept:
        if group.heads is not None:
            keys, each = int(mask.sum()), group.heads.queries // group.heads.keys
            left.setdefault((group.heads.queries, group.heads.keys), set()).add((keys * each, keys))
    places = [getattr(child, "config", None) for child in module.modules()]
    for config in {id(place): place for place in places if is_model_config(place)}.values():
        for (queries, keys), sizes in left.items():
            if len(sizes) > 1:
                continue
            new_queries, new_keys = next(iter(sizes))
            for name, value in vars(config).items():
                if type(value) is not int or "head" not in name or not _counts(name):
                    continue
                is_of_keys = "key" in name or "kv" in name
                if value == (keys if is_of_keys else queries):
                    yield config, name, new_keys if is_of_keys else new_queries


def _ways_of_modules(module: nn.Module, kept: Kept) -> Iterator[Numbers]:
    counts: Numbers = []
    widths: dict[tuple[int, str], tuple[nn.Module, str, int]] = {}
    new_sizes: dict[int, int] = {}
    for group, mask in kept:
        left = int(mask.sum())
        if group.heads is not None:
            owner = module.get_submodule(group.name)
            repeated = group.heads.queries // group.heads.keys
            inner = {group.heads.width: left * repeated * group.heads.size}
            inner[group.heads.keys * group.heads.size] = left * group.heads.size
            for child in owner.modules():
                for name, value in _integers(child):
                    if "head" in name and value in (group.heads.queries, group.heads.keys) and _counts(name):
                        is_of_keys = value == group.heads.keys and ("key" in name or "kv" in name)
                        counts.append((child, name, left if is_of_keys else left * repeated))
                    elif "group" in name and value == group.heads.queries == group.heads.keys:
                        counts.append((child, name, left))  # queries to a key, of the one key that all share
                    elif value in inner and _is_width(name):
                        widths[id(child), name] = (child, name, inner[value])
        elif group.kind == "width":
            new_sizes[group.size] = left
    stream: Numbers = [
        (child, name, new_sizes[value])
        for child in module.modules()
        for name, value in _integers(child)
        if value in new_sizes and _is_width(name) and (id(child), name) not in widths
    ]
    yield counts
    if widths:
        yield [*counts, *widths.values()]
    if stream:
        yield [*counts, *widths.values(), *stream]


def _integers(module: nn.Module) -> list[tuple[str, int]]:
    """A module's own integers, without those of torch's layers, which are read off their tensors."""
    if type(module).__module__.startswith("torch.") or type(module).__name__ == "Conv1D":
        return []
    return [(name, value) for name, value in vars(module).items() if type(value) is int]


def _counts(name: str) -> bool:
    return "dim" not in name and "size" not in name


def _is_width(name: str) -> bool:
    return any(part in name for part in _WIDTH_NAMES) and not any(part in name for part in _NO_WIDTHS)


class _Undo:
    """Puts back attributes, last first."""

    def __init__(self) -> None:
        self._old: list[tuple[Any, str, Any]] = []

    def set(self, holder: Any, name: str, value: Any) -> None:
        self._old.append((holder, name, getattr(holder, name)))
        setattr(holder, name, value)

    def run(self) -> None:
        for holder, name, value in reversed(self._old):
            setattr(holder, name, value)


@dataclass(frozen=True)
class Smaller:
    """What became of a tensor: the new one, and what was kept along which dimensions."""

    new: Tensor
    kept: Mapping[int, Tensor]

    def cut(self, tensor: Tensor) -> Tensor:
        """What is left of ``tensor``, of the shape of the old one."""
        for dimension, mask in self.kept.items():
            tensor = tensor.index_select(dimension, mask.nonzero().view(-1).to(tensor.device))
        return tensor


def _apply(module: nn.Module, kept: Kept, numbers: Numbers, undo: _Undo) -> dict[Tensor, Smaller]:
    masks: dict[Tensor, dict[int, Tensor]] = {}
    for group, units in kept:
        for slot in group.slots:
            mask = (slot.units < 0) | units[slot.units.clamp_min(0)]
            along = masks.setdefault(slot.tensor, {})
            along[slot.dimension] = along[slot.dimension] & mask if slot.dimension in along else mask
    smaller: dict[Tensor, Smaller] = {}
    for tensor, along in masks.items():
        cut = Smaller(tensor, along).cut
        new = cut(tensor.detach()).clone(memory_format=torch.contiguous_format)
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, tensor.requires_grad)
            new.grad = None if tensor.grad is None else cut(tensor.grad)
        smaller[tensor] = Smaller(new, along)
    for child in module.modules():  # wherever a tensor is registered, tied ones twice
        held = (*child._parameters.items(), *child._buffers.items())
        found = [(name, smaller[tensor].new) for name, tensor in held if tensor is not None and tensor in smaller]
        for name, new in found:
            undo.set(child, name, new)
        if found:
            for name, value in _sizes_of(child):
                undo.set(child, name, value)
    for child in module.modules():
        attentions = (
            [one for one in child.modules() if _is_attention(one)] if isinstance(child, nn.Transformer) else []
        )
        if attentions:  # it compares what it reads with a size of its own
            undo.set(child, "d_model", dict(_sizes_of(attentions[0]))["embed_dim"])
        if _is_attention(child):
            for name, value in _sizes_of(child):
                undo.set(child, name, value)
    for holder, name, value in numbers:
        undo.set(holder, name, value)
    return smaller


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None


def _sizes_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes of torch's layers that say how large their tensors are."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.MultiheadAttention):
        assert module.in_proj_weight is not None
        inner, width = module.in_proj_weight.shape
        yield from {"embed_dim": width, "kdim": width, "vdim": width}.items()
        yield "num_heads", inner // 3 // module.head_dim
    elif weight is None:
        if isinstance(module, _NormBase) and module.running_mean is not None:
            yield "num_features", len(module.running_mean)
    elif isinstance(module, nn.Linear):
        yield from {"out_features": weight.shape[0], "in_features": weight.shape[1]}.items()
    elif isinstance(module, _ConvNd):
        depthwise = module.groups > 1
        outputs, inputs = (weight.shape[1], weight.shape[0]) if module.transposed else weight.shape[:2]
        if depthwise:
            outputs = inputs = weight.shape[0]
            yield "groups", outputs
        yield from {"out_channels": outputs, "in_channels": inputs}.items()
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        yield "normalized_shape", tuple(weight.shape)
    elif isinstance(module, _NormBase):
        yield "num_features", len(weight)
    elif isinstance(module, nn.Embedding):
        yield "embedding_dim", weight.shape[1]
    elif isinstance(module, nn.PReLU):
        yield "num_parameters", len(weight)
    elif type(module).__name__ == "Conv1D":
        yield from {"nx": weight.shape[0], "nf": weight.shape[1]}.items()


def _output_shapes(module: nn.Module, call: Call) -> list[torch.Size]:
    modes = {child: child.training for child in module.modules()}
    try:
        module.eval()
        with torch.enable_grad(), _NoEmptyAttention():
            return [tensor.shape for tensor in output_tensors(call(module))]
    finally:
        for child, mode in modes.items():
            child.training = mode


class _NoEmptyAttention(TorchFunctionMode):
    """Refuses attention without heads, as numbers make it that do not fit: it computes nothing, in the shapes asked
    for, and ends the process by a division by zero with torch 2.11."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and any(
            isinstance(value, Tensor) and value.numel() == 0 for value in (*args, *kwargs.values())
        ):
            raise ValueError("no heads are left to attention")
        return func(*args, **kwargs)
