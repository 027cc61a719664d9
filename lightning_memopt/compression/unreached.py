"""Parameters that go with units and that the dependency graph does not reach, or takes for something else.

That they go together is read from their places and sizes; a smaller module that does not run with them is put back.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_memopt.compression.slots import Slot, UnitGroup
from lightning_memopt.models.experts import Experts, read_experts

ALIGNED = 8
"""What the number of features must be a multiple of in grouped products, whose rows begin every 16 bytes (bf16)."""


def add_unreached(module: nn.Module, groups: Sequence[UnitGroup], names: Mapping[int, str]) -> list[UnitGroup]:
    """Add to ``groups`` slots of tensors that are in none, and return groups of what is within experts.

    Args:
        module: The module.
        groups: What was found of it.
        names: Qualified names of its modules, by their ids.
    """
    held = {id(tensor) for child in module.modules() if read_experts(child) for tensor in child._parameters.values()}
    reached = {id(slot.tensor) for group in groups for slot in group.slots}
    for group, slot in [*_beside_heads(module, groups), *_of_streams(module, groups, names)]:
        if id(slot.tensor) not in reached:
            group.slots.append(slot)
            group.multiple = ALIGNED if id(slot.tensor) in held else group.multiple
    return list(_within_experts(module, names))


def _beside_heads(module: nn.Module, groups: Sequence[UnitGroup]) -> Iterator[tuple[UnitGroup, Slot]]:
    """Norms over all heads at once, and what has a column for each, such as biases of positions, or a number."""
    attentions = [group for group in groups if group.heads is not None and group.reason is None]
    slots = {id(group): list(_in_attention(module.get_submodule(group.name), group)) for group in attentions}
    for group in attentions:
        kind = type(module.get_submodule(group.name))
        alike = [other for other in attentions if type(module.get_submodule(other.name)) is kind]
        for slot in slots[id(group)]:
            # One that only some attentions have is handed on to others (T5's), whose heads would have to be the same.
            if slot.tensor.ndim == 1 or all(
                any(found.name == slot.name for found in slots[id(other)]) for other in alike
            ):
                yield group, slot


def _in_attention(owner: nn.Module, group: UnitGroup) -> Iterator[Slot]:
    heads = group.heads
    assert heads is not None
    by_query = torch.arange(heads.keys).repeat_interleave(heads.queries // heads.keys)
    for child in owner.modules():
        is_norm = "norm" in type(child).__name__.lower()
        for name, tensor in child._parameters.items():
            if tensor is None or isinstance(child, nn.Linear | nn.Embedding | _ConvNd):
                continue
            if is_norm and tensor.ndim == 1 and heads.width != heads.size:
                keys = torch.arange(heads.keys).repeat_interleave(heads.size)
                if len(tensor) in (heads.width, len(keys)):
                    units = keys if len(tensor) == len(keys) else by_query.repeat_interleave(heads.size)
                    yield Slot(child, name, 0, units)
            elif not is_norm and list(tensor.shape).count(heads.queries) == 1:
                yield Slot(child, name, list(tensor.shape).index(heads.queries), by_query)


def _of_streams(
    module: nn.Module, groups: Sequence[UnitGroup], names: Mapping[int, str]
) -> Iterator[tuple[UnitGroup, Slot]]:
    """What reads and writes the width between blocks: experts, their routers, and positions that have no gradient."""
    for child in module.modules():
        if (experts := read_experts(child)) is not None:
            group = _stream(groups, experts.outer, names[id(child)], names)
            if group is not None:
                yield from ((group, slot) for slot in _outer_slots(child, experts))
                yield from ((group, slot) for slot in _routers(module, names[id(child)], experts))
        elif isinstance(child, nn.Embedding):
            group = _stream(groups, child.embedding_dim, names[id(child)], names)
            if group is not None:
                yield group, Slot(child, "weight", 1, torch.arange(child.embedding_dim))


def _stream(groups: Sequence[UnitGroup], size: int, name: str, names: Mapping[int, str]) -> UnitGroup | None:
    """The stream of that width nearest to the module ``name``, by the names of what is in it."""
    streams = [group for group in groups if group.kind == "width" and group.size == size and group.reason is None]

    def nearness(group: UnitGroup) -> int:
        return max(_common(name.split("."), names[id(slot.module)].split(".")) for slot in group.slots)

    return max(streams, key=nearness, default=None)


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _outer_slots(module: nn.Module, experts: Experts) -> Iterator[Slot]:
    units = torch.arange(experts.outer)
    yield Slot(module, experts.up, 3 - experts.output_dim, units)
    yield Slot(module, experts.down, experts.output_dim, units)
    yield from _bias(module, experts.down, units)


def _routers(module: nn.Module, name: str, experts: Experts) -> Iterator[Slot]:
    """Matrices from the stream to a number for each expert, in the module around the experts."""
    count = len(getattr(module.get_submodule(name), experts.down))
    for child in module.get_submodule(name.rpartition(".")[0]).modules():
        weight = child._parameters.get("weight")
        if weight is not None and weight.shape == (count, experts.outer) and count != experts.outer:
            yield Slot(child, "weight", 1, torch.arange(experts.outer))


def _within_experts(module: nn.Module, names: Mapping[int, str]) -> Iterator[UnitGroup]:
    for child in module.modules():
        experts = read_experts(child)
        if experts is None:
            continue
        units = torch.arange(experts.inner)
        made = {"": units, "behind": units.repeat(2), "between": units.repeat_interleave(2)}[experts.gate]
        slots = [
            Slot(child, experts.up, experts.output_dim, made),
            *_bias(child, experts.up, made),
            Slot(child, experts.down, 3 - experts.output_dim, units),
        ]
        yield UnitGroup(names[id(child)], "channels", experts.inner, slots, multiple=ALIGNED)


def _bias(module: nn.Module, weight: str, units: Tensor) -> Iterator[Slot]:
    bias = module._parameters.get(f"{weight}_bias")
    if bias is not None:
        yield Slot(module, f"{weight}_bias", 1, units)
