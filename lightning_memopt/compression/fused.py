"""Fused projections: how queries, keys and values, or a gate and what it opens, lie in the outputs of one layer.

Side by side, interleaved or by groups, as their authors liked. Each way is a guess, which the gradients of one run
prove: an input of the next layer depends on the outputs that are its own, and on no others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memopt.models.heads import Heads, read_heads
from lightning_memopt.models.linear_groups import LinearGroup
from lightning_memopt.models.linears import LinearShape, read_linear


@dataclass(frozen=True)
class Fused:
    """A layer whose outputs are several things at once, and the layer that reads what becomes of them.

    Attributes:
        owner: Qualified name of the module that holds both.
        column: The first layer.
        row: The second.
        pieces: In how many equal pieces the inputs of ``row`` are: heads, or features.
        readers: Of each output of ``column``, the first piece that depends on it and how many do, ``(outputs, 2)``.
        heads: Of an attention.
    """

    owner: str
    column: nn.Module
    row: nn.Module
    pieces: int
    readers: Tensor
    heads: Heads | None = None

    @property
    def units(self) -> tuple[Tensor, Tensor]:
        """The unit of each output, ``-1`` for what all pieces read, and of each input of the row."""
        first, count = self.readers.unbind(1)
        together = int(count.max())
        if together == self.pieces:  # one key for all queries
            first, together = first.where(count < self.pieces, torch.tensor(-1)), 1
        shape = read_linear(self.row)
        assert shape is not None
        inputs = torch.arange(shape.in_features) // (shape.in_features // self.pieces * together)
        return first.div(together, rounding_mode="floor"), inputs


def find_fused(
    module: nn.Module, call: Callable[[nn.Module], Any], groups: Sequence[LinearGroup]
) -> tuple[list[Fused], list[Fused]]:
    """The fused projections of ``module`` that a run of it proves to be such.

    Args:
        module: A module that is ready to be followed; it is run once where it may have some.
        call: Runs it.
        groups: What is known of its linear layers. That queries, keys and values of one layer lie as it says is a
            guess too.

    Returns:
        Those that are proven, and attentions of which the run shows that they are none of those that are known.
    """
    said = [*_gates(module, groups), *_known_attentions(module, groups)]
    guessed = {(ways[0].column, ways[0].row): ways for ways in _attentions(module, groups)}  # of the innermost module
    guesses = [*said, *guessed.values()]
    agreeing = _agreeing(module, call, guesses) if guesses else {}
    found: dict[nn.Module, Fused] = {}
    for way in agreeing.values():
        if way is not None:
            found.setdefault(way.column, way)
    wrong = [ways[0] for place, ways in enumerate(said) if place in agreeing and agreeing[place] is None]
    return list(found.values()), [one for one in wrong if one.heads is not None and one.column not in found]


def _gates(module: nn.Module, groups: Sequence[LinearGroup]) -> Iterator[list[Fused]]:
    for group in groups:
        if group.heads is not None or len(group.columns) != 1 or group.columns[0].pieces != 2:
            continue
        row, column = module.get_submodule(group.row), module.get_submodule(group.columns[0].name)
        features = torch.arange(_shape(row).in_features)
        ways = (features.repeat(2), features.repeat_interleave(2))
        yield [
            Fused(group.owner, column, row, len(features), torch.stack([way, torch.ones_like(way)], 1))
            for way in ways
        ]


def _known_attentions(module: nn.Module, groups: Sequence[LinearGroup]) -> Iterator[list[Fused]]:
    for group in groups:
        if group.heads is not None and len(group.columns) == 1:
            column, row = module.get_submodule(group.columns[0].name), module.get_submodule(group.row)
            if ways := _ways_of(group.owner, column, row, group.heads.queries):
                yield ways


def _attentions(module: nn.Module, groups: Sequence[LinearGroup]) -> Iterator[list[Fused]]:
    """Modules with one layer for queries, keys and values, and one that reads what becomes of the queries."""
    known = {name for group in groups if group.heads is not None for name in group.names}
    for name, owner in module.named_modules():
        inside = [(f"{name}.{key}" if name else key, child) for key, child in owner.named_modules()]
        linears = [child for key, child in inside if read_linear(child) is not None and key not in known]
        if len(linears) != 2 or len(linears) != sum(read_linear(child) is not None for _, child in inside):
            continue
        for column, row in (linears, linears[::-1]):
            heads = read_heads(owner, _shape(row).in_features)
            if heads is None or _shape(column).in_features != _shape(row).out_features:
                continue
            if ways := _ways_of(name, column, row, heads.queries):
                yield ways


def _ways_of(owner: str, column: nn.Module, row: nn.Module, queries: int) -> list[Fused]:
    width, outputs = _shape(row).in_features, _shape(column).out_features
    size, rest = divmod(width, queries)
    keys = (outputs // size - queries) // 2 if size and not rest else 0
    if keys < 1 or (queries + 2 * keys) * size != outputs or queries % keys:
        return []
    # A key that all queries share stays, and queries go one by one, as if each had its own.
    heads = Heads(queries, queries if keys == 1 else keys, size)
    return [Fused(owner, column, row, queries, way, heads) for way in _ways_of_heads(queries, keys, size)]


def _ways_of_heads(queries: int, keys: int, size: int) -> Iterator[Tensor]:
    each = queries // keys
    of_queries = torch.stack([torch.arange(queries), torch.ones(queries, dtype=torch.long)], 1)
    of_keys = torch.stack([torch.arange(keys) * each, torch.full((keys,), each)], 1)
    side_by_side = torch.cat([of_queries, of_keys, of_keys])
    by_groups = torch.cat([of_queries.view(keys, each, 2), of_keys[:, None], of_keys[:, None]], 1).view(-1, 2)
    yield from (way.repeat_interleave(size, 0) for way in (side_by_side, by_groups))


def _agreeing(
    module: nn.Module, call: Callable[[nn.Module], Any], guesses: Sequence[Sequence[Fused]]
) -> dict[int, Fused | None]:
    """Of each of ``guesses`` of which something could be seen, by its place, the way that it was, or ``None``."""
    given: dict[nn.Module, Tensor] = {}
    read: dict[nn.Module, Tensor] = {}

    def keep_given(layer: nn.Module, _: Any, output: Any) -> None:
        given.setdefault(layer, output)

    def keep_read(layer: nn.Module, inputs: Any) -> None:
        if inputs:
            read.setdefault(layer, inputs[0])

    handles = [ways[0].column.register_forward_hook(keep_given) for ways in guesses]
    handles += [ways[0].row.register_forward_pre_hook(keep_read) for ways in guesses]
    try:
        call(module)
        agreeing: dict[int, Fused | None] = {}
        for place, ways in enumerate(guesses):
            output, inputs = given.get(ways[0].column), read.get(ways[0].row)
            if output is not None and inputs is not None and (seen := _dependences(output, inputs, ways[0].pieces)):
                fits = (way for way in ways if all(_agrees(way, *each) for each in seen.items()))
                agreeing[place] = next(fits, None)
        return agreeing
    except Exception:  # what cannot be run is said where it is followed
        return {}
    finally:
        for handle in handles:
            handle.remove()


def _dependences(output: Tensor, inputs: Tensor, pieces: int) -> dict[int, Tensor]:
    """Of some pieces of ``inputs``, on which of the last dimension of ``output`` they depend."""
    if not (inputs.requires_grad and output.requires_grad) or inputs.shape[-1] % pieces:
        return {}
    weights = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(0)).to(inputs) + 0.5
    parts = (inputs * weights).unflatten(-1, (pieces, -1))
    seen = {}
    for piece in sorted({0, 1, pieces // 2, pieces - 1}):
        gradient = torch.autograd.grad(parts[..., piece, :].sum(), output, retain_graph=True, allow_unused=True)[0]
        if gradient is None:
            return {}
        seen[piece] = (gradient != 0).flatten(0, -2).any(0).cpu()
    return seen


def _agrees(way: Fused, piece: int, seen: Tensor) -> bool:
    first, count = way.readers.unbind(1)
    return torch.equal((first <= piece) & (piece < first + count), seen)


def _shape(layer: nn.Module) -> LinearShape:
    shape = read_linear(layer)
    assert shape is not None
    return shape
