"""Measure and split a batch of any of the shapes that a collate function returns."""

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

_SHARED = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
"""Leaves that say something about the whole batch wherever they are not listed one a sample."""

Split = Callable[[Any, int], Sequence[Any]]
"""Cuts a batch into micro-batches of at most so many samples: :func:`micro_batches`, or what a user gives."""

_GIVE_SPLIT = "give `split=`, a function (batch, size) -> list of micro-batches"


class CannotCut(ValueError):
    """A batch that cannot be cut into micro-batches.

    Attributes:
        found: What it is and why it cannot be cut, without what to do: that depends on who cuts.
    """

    def __init__(self, found: str, remedy: str = _GIVE_SPLIT) -> None:
        super().__init__(f"{found}; {remedy}.")
        self.found = found


Samples = tuple[type, ...]
"""Which of mappings and tensors are samples where a list holds nothing else; other such lists are containers."""


def batch_size(batch: Any) -> int:
    """Number of samples in ``batch``: the first dimension that its tensors agree on.

    Args:
        batch: A tensor, or dicts, lists, tuples, named tuples and dataclasses of them, nested as deep as you like;
            a ``BatchEncoding`` and other mappings too. Tensors of no dimension and what is not a tensor say
            nothing about the size, except that in a batch without tensors the lists of samples do.

    Returns:
        The number of samples.

    Raises:
        CannotCut: Tensors disagree on the first dimension, or nothing in the batch has one.

    Example:
        >>> batch_size({"x": torch.zeros(8, 3), "scale": torch.tensor(2.0)})
        8
    """
    return _read_size(batch)[0]


def micro_batches(batch: Any, size: int) -> list[Any]:
    """Split ``batch`` into micro-batches of at most ``size`` samples, of the same type as the batch.

    Tensors are cut along their first dimension and share memory with the batch. Lists of dicts, strings and other
    objects that are as long as the batch are cut too. So are lists of tensors within the batch that are one for each
    sample (images of several sizes beside a list of dicts, as for torchvision's detectors): those as long as
    everything else, where first dimensions are not. Everything else (tensors of no dimension, numbers, ``None``)
    is in each micro-batch.

    Args:
        batch: See :func:`batch_size`.
        size: Samples in a micro-batch; the last has what remains.

    Returns:
        The micro-batches in order; the batch itself, alone, where it is no larger than ``size``.

    Raises:
        ValueError: ``size`` is below 1, or (:class:`CannotCut`) the size of the batch cannot be told, or in two
            ways.

    Example:
        >>> [micro["x"].shape[0] for micro in micro_batches({"x": torch.zeros(8, 3)}, 3)]
        [3, 3, 2]
    """
    if size < 1:
        raise ValueError(f"a micro-batch of {size} samples was asked for; it must have at least 1.")
    total, samples = _read_size(batch)
    if total <= size:
        return [batch]
    windows = [slice(start, start + size) for start in range(0, total, size)]
    return _cut_all(batch, windows, total, samples)


def split_evenly(batch: Any, count: int) -> list[Any]:
    """Split ``batch`` into ``count`` micro-batches whose sizes differ by one sample at most, larger ones first.

    Args:
        batch: See :func:`batch_size`.
        count: How many; at most the number of samples.

    Raises:
        CannotCut: The size of the batch cannot be told.

    Example:
        >>> [micro["x"].shape[0] for micro in split_evenly({"x": torch.zeros(8, 3)}, 3)]
        [3, 3, 2]
    """
    if count == 1:
        return [batch]
    total, samples = _read_size(batch)
    bounds = [-(-total * index // count) for index in range(count + 1)]
    windows = [slice(start, end) for start, end in pairwise(bounds)]
    return _cut_all(batch, windows, total, samples)


def merge_outputs(outputs: Sequence[Any], sizes: Sequence[int | None], weights: Sequence[float | Tensor]) -> Any:
    """Put together what the same step returned for each micro-batch of a batch.

    Tensors with one row a sample are concatenated, floating tensors of no dimension become their weighted mean,
    mappings, lists and tuples are merged item by item, and for anything else there is a list with one item for each
    micro-batch.

    Args:
        outputs: One output for each micro-batch.
        sizes: Samples in each micro-batch; ``None`` where unknown.
        weights: What each weighs in a mean; they sum to 1.

    Example:
        >>> outputs = [{"logits": torch.zeros(3, 2)}, {"logits": torch.zeros(1, 2)}]
        >>> merge_outputs(outputs, sizes=[3, 1], weights=[0.75, 0.25])["logits"].shape
        torch.Size([4, 2])
    """
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if all(isinstance(output, Tensor) for output in outputs):
        return _merge_tensors(list(outputs), sizes, weights)
    same_keys = isinstance(first, Mapping) and all(
        isinstance(output, Mapping) and output.keys() == first.keys() for output in outputs
    )
    same_length = isinstance(first, list | tuple) and all(
        isinstance(output, type(first)) and len(output) == len(first) for output in outputs
    )
    if not same_keys and not same_length:
        return list(outputs)
    parts = [[value for _, value in _parts(output) or ()] for output in outputs]
    return _rebuild(first, [merge_outputs(items, sizes, weights) for items in zip(*parts, strict=True)])


def tensors_in(batch: Any) -> list[Tensor]:
    """The tensors in ``batch``, of any of the containers that :func:`batch_size` reads.

    Example:
        >>> [tensor.shape for tensor in tensors_in({"x": torch.zeros(8, 3), "names": ["a"] * 8})]
        [torch.Size([8, 3])]
    """
    if isinstance(batch, Tensor):
        return [batch]
    return [tensor for _, part in _parts(batch) or () for tensor in tensors_in(part)]


def weigh(loss: Tensor, weight: float | Tensor) -> Tensor:
    """``loss * weight``, where a weight of 0 gives 0 even if the loss, a mean over nothing, is not a number."""
    if not isinstance(weight, Tensor):
        if weight > 0:
            return loss * weight
        weight = torch.zeros_like(loss)
    weight = weight.to(loss.device)
    return torch.where(weight > 0, loss, torch.zeros_like(loss)) * weight


def mapped(item: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``item`` with containers made anew, frozen dataclasses too, and ``function`` of each tensor in its place.

    Example:
        >>> mapped({"x": [torch.ones(2), "name"]}, torch.Tensor.bfloat16)["x"][0].dtype
        torch.bfloat16
    """
    if isinstance(item, Tensor):
        return function(item)
    parts = _parts(item)
    return item if parts is None else _rebuild(item, [mapped(part, function) for _, part in parts])


def detached(item: Any) -> Any:
    """``item`` with each tensor in it detached from its graph."""
    return mapped(item, Tensor.detach)


def copied(item: Any) -> Any:
    """``item`` with containers made anew and tensors copied, for a step that may change its batch."""
    return mapped(item, Tensor.clone)


def _merge_tensors(tensors: list[Tensor], sizes: Sequence[int | None], weights: Sequence[float | Tensor]) -> Any:
    if all(tensor.ndim == 0 and tensor.is_floating_point() for tensor in tensors):
        return sum(weigh(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True))
    rows_are_samples = all(
        tensor.ndim > 0 and tensor.shape[0] == size for tensor, size in zip(tensors, sizes, strict=True)
    )
    if rows_are_samples and len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(tensors)
    return tensors


def _read_size(batch: Any) -> tuple[int, Samples | None]:
    """Number of samples, and which lists hold one item a sample; ``None`` where two readings give the same number.

    Lists of dicts do beside tensors that give the size (images and the boxes in each); alone they are lists of
    batches, as several loaders give. Lists of tensors do where :func:`_lists_of_tensors_hold_samples` says so.
    """
    hold_samples = _lists_of_tensors_hold_samples(batch)
    samples: Samples = (Mapping, Tensor) if hold_samples else (Mapping,)
    sizes = dict(_tensor_sizes(batch, "batch", samples))
    if not sizes:
        samples = ()
        sizes = dict(_tensor_sizes(batch, "batch", samples))
    sizes = sizes or {name: len(part) for name, part in _sample_lists(batch, "batch", ())}
    if not sizes:
        raise CannotCut(
            f"the batch, a {type(batch).__name__}, holds no tensor with a first dimension and no list of samples, so "
            "its size is unknown"
        )
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise CannotCut(
            f"the tensors of the batch disagree on the number of samples ({found}), so it cannot be cut along the "
            "first dimension"
        )
    size = next(iter(sizes.values()))
    _refuse_one_item_a_sample(batch, size)
    return size, None if hold_samples is None else samples


def _refuse_one_item_a_sample(batch: Any, size: int) -> None:
    """Refuse what a collate function that changes nothing returns: cut as batches, its images would lose channels.

    Several loaders give a list of batches that looks the same, but of fewer loaders than samples.
    """
    if not isinstance(batch, list | tuple) or _is_named_tuple(batch) or not 1 < size < len(batch):
        return
    for kind in (Mapping, list | tuple):
        if all(isinstance(item, kind) and len(item) == len(batch[0]) for item in batch):
            raise CannotCut(
                f"the batch is a {type(batch).__name__} of {len(batch)} {type(batch[0]).__name__}s, in each of which "
                f"tensors have {size} rows, so it may be of one {type(batch[0]).__name__} a sample, or of as many "
                f"batches of {size} samples",
                f"collate samples to tensors, or {_GIVE_SPLIT}",
            )


def _lists_of_tensors_hold_samples(batch: Any) -> bool | None:
    """Whether lists of tensors within the batch hold one tensor a sample, such as images of several sizes.

    They do if they are as long as all else in the batch and first dimensions say something else (for images, the
    number of channels) and, where there is no dict a sample, they are of one type and as many dimensions. Where those
    say the same, it takes a dict a sample and tensors of several shapes; with such dicts and one shape nobody knows
    (``None``). Otherwise a list of tensors is a container, such as two views of each
    sample.
    """
    lists = [part for _, part in _sample_lists(batch, "batch", (Mapping, Tensor))]
    of_tensors = [part for part in lists if isinstance(part[0], Tensor) and part is not batch]
    if not of_tensors or len(set(dict(_tensor_sizes(batch, "batch", (Mapping, Tensor))).values())) > 1:
        return False
    by_row = set(dict(_tensor_sizes(batch, "batch", (Mapping,))).values())
    of_dicts = {len(part) for part in lists if isinstance(part[0], Mapping)}
    if not of_dicts and any(len({(x.ndim, x.dtype) for x in tensors}) > 1 for tensors in of_tensors):
        return False  # inputs and labels, say, in a batch of each of several loaders
    if len(by_row | of_dicts) > 1:
        return True
    are_ragged = any(len({tensor.shape[1:] for tensor in tensors}) > 1 for tensors in of_tensors)
    return None if of_dicts and by_row and not are_ragged else bool(of_dicts)


def _tensor_sizes(item: Any, name: str, samples: Samples) -> Iterator[tuple[str, int]]:
    """First dimensions of the tensors that are to be cut, by where they are; refuses what cannot be.

    Where lists of tensors hold samples, the lengths of these lists, and of those of dicts, too.
    """
    if isinstance(item, Tensor):
        if item.is_nested:
            raise CannotCut(f"{name} is a nested tensor, which cannot be cut into views")
        if item.ndim:
            yield name, item.shape[0]
    elif isinstance(item, PackedSequence):
        raise CannotCut(
            f"{name} is a PackedSequence, whose rows are not samples", f"pack in the step, or {_GIVE_SPLIT}"
        )
    elif _is_list_of_samples(item, samples):
        if Tensor in samples and isinstance(item[0], samples):
            yield name, len(item)
    else:
        parts = _parts(item)
        if parts is None or _is_dataclass_instance(item):
            _refuse_hidden_tensors(item, name)
        for key, part in parts or ():
            yield from _tensor_sizes(part, f"{name}{key}", samples)


def _sample_lists(item: Any, name: str, samples: Samples) -> Iterator[tuple[str, Sequence[Any]]]:
    if _is_list_of_samples(item, samples):
        yield name, item
    else:
        for key, part in _parts(item) or ():
            yield from _sample_lists(part, f"{name}{key}", samples)


def _parts(item: Any) -> list[tuple[str, Any]] | None:
    """The named parts of a container, ``None`` for a leaf."""
    if isinstance(item, Mapping):
        return [(f"[{key!r}]", value) for key, value in item.items()]
    if _is_named_tuple(item):
        return [(f".{field}", getattr(item, field)) for field in item._fields]
    if isinstance(item, list | tuple):
        return [(f"[{index}]", value) for index, value in enumerate(item)]
    if _is_dataclass_instance(item):
        return [(f".{field.name}", getattr(item, field.name)) for field in dataclasses.fields(item)]
    return None


def _cut_all(batch: Any, windows: list[slice], total: int, samples: Samples | None) -> list[Any]:
    if samples is None:
        raise CannotCut(
            f"the batch has {total} dicts, one for each sample, and a list of {total} tensors of one shape whose "
            f"first dimension is {total} too, so it may be of one tensor a sample or of all samples in each"
        )
    return [_cut(batch, window, total, samples) for window in windows]


def _cut(item: Any, window: slice, total: int, samples: Samples) -> Any:
    if isinstance(item, Tensor):
        return item[window] if item.ndim else item
    if _is_list_of_samples(item, samples):
        return item[window] if len(item) == total else item
    parts = _parts(item)
    return item if parts is None else _rebuild(item, [_cut(part, window, total, samples) for _, part in parts])


def _rebuild(item: Any, values: list[Any]) -> Any:
    """A container like ``item`` that holds ``values``, given in the order of its parts.

    What is cached in it was computed from other values.
    """
    twin: Any
    if isinstance(item, Mapping):
        if not isinstance(item, dict | UserDict):
            return _rebuild_unknown_mapping(item, dict(zip(item, values, strict=True)))
        # A copy keeps what else the mapping knows (a default factory, a tokenizer's encodings).
        twin = copy.copy(item)
        for key, value in zip(item, values, strict=True):
            twin[key] = value
        return twin
    if _is_named_tuple(item):
        return type(item)(*values)
    if isinstance(item, list | tuple):
        return type(item)(values)
    twin = copy.copy(item)
    for name in _cached(item):
        del vars(twin)[name]
    for field, value in zip(dataclasses.fields(item), values, strict=True):
        object.__setattr__(twin, field.name, value)  # frozen dataclasses too
    return twin


def _rebuild_unknown_mapping(item: Mapping[Any, Any], content: dict[Any, Any]) -> Any:
    """Make the mapping anew: a copy may share what holds the items with ``item``, and would write into it."""
    kind: Any = type(item)
    try:
        twin = kind(content)
        if twin.keys() == content.keys():
            return twin
        problem = "it has other keys then"
    except Exception as error:  # whatever a constructor does with an argument that it does not expect
        problem = f"{type(error).__name__}: {error}"
    raise CannotCut(
        f"the batch has a {kind.__qualname__}, a mapping that cannot be made from a dict ({problem}), so it cannot "
        "be cut"
    )


def _is_list_of_samples(item: Any, samples: Samples) -> bool:
    """Whether a list or tuple holds one string or object a sample, or one of the kinds in ``samples``."""
    if not isinstance(item, list | tuple) or _is_named_tuple(item) or not item:
        return False
    for kind in (Mapping, Tensor):
        if all(isinstance(part, kind) for part in item):
            return kind in samples
    return all(_parts(part) is None and not isinstance(part, Tensor) for part in item)


def _is_named_tuple(item: Any) -> bool:
    return isinstance(item, tuple) and hasattr(item, "_fields")


def _is_dataclass_instance(item: Any) -> bool:
    return dataclasses.is_dataclass(item) and not isinstance(item, type)


def _cached(item: Any) -> set[str]:
    kind = type(item)
    return {name for name in getattr(item, "__dict__", ()) if isinstance(getattr(kind, name, None), cached_property)}


def _refuse_hidden_tensors(item: Any, name: str) -> None:
    """An object that keeps tensors where they cannot be seen would be given whole to each micro-batch."""
    if isinstance(item, _SHARED):
        return
    known = {field.name for field in dataclasses.fields(item)} if _is_dataclass_instance(item) else set()
    kept = {key: value for key, value in getattr(item, "__dict__", {}).items() if key not in known}
    hidden = [key for key in kept.keys() - _cached(item) if isinstance(kept[key], Tensor) and kept[key].ndim]
    if hidden:
        raise CannotCut(
            f"{name} is a {type(item).__qualname__} that holds tensors ({', '.join(sorted(hidden))}) and is "
            "neither a mapping nor a sequence, nor are they fields of a dataclass, so it cannot be cut"
        )
