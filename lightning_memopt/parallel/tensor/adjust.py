"""Make a module's code, written for whole values, run on a part of the features."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from lightning_memopt.models.instance_patch import replaced
from lightning_memopt.models.linear_groups import LinearGroup
from lightning_memopt.parallel.tensor.collectives import enter, gather, take_part


@dataclass(frozen=True)
class Adjustment:
    """What code needs to run on a part of the features.

    Attributes:
        numbers: Modules, and what some of their integer attributes have to be.
        narrows: Whether its inputs have to look narrower than they are: code that takes its width from an input
            (``batch, length, width = x.shape``) then takes a rank's. The split layers know the whole input.
        deals_heads: What it takes, makes and gives for each head (biases, attention weights) is dealt out to the
            ranks, and put together again.
        rows: Its arguments, by place or name, that have a row for each head, as :func:`is_row_of_heads` says. By
            their shape alone they could be hidden states of one token.
    """

    numbers: Sequence[tuple[nn.Module, dict[str, int]]] = ()
    narrows: bool = False
    deals_heads: bool = False
    rows: frozenset[int | str] = frozenset()


NO_ADJUSTMENT = Adjustment()
"""For code that runs on a part as it is."""


def possible_adjustments(
    group: LinearGroup, owner: nn.Module, width: int, size: int, rows: frozenset[int | str] = frozenset()
) -> list[Adjustment]:
    """What ``owner`` may need on one of ``size`` ranks, to be tried in order.

    ``width`` is the number of features between the layers of ``group``, ``rows`` are those of an adjustment. First
    nothing is changed: code that views heads with ``-1`` needs nothing. Then numbers of heads (``num_heads``), then
    widths as well (``split_size``, ``embed_dim``), then widths alone; and all that with narrower inputs, or with
    tensors of heads dealt out.
    """
    heads = {group.heads.queries, group.heads.keys} if group.heads is not None else set()
    widths = {width} | ({group.heads.keys * group.heads.size} if group.heads is not None else set())
    counts, sizes = [], []
    for module in owner.modules():
        if "_tensor_split" in vars(module):  # sizes that it does not read
            continue
        integers = {k: v for k, v in vars(module).items() if type(v) is int and v % size == 0 and v > 0}
        mine = {k: v // size for k, v in integers.items() if v in heads and _counts_heads(k)}
        wide = {k: v // size for k, v in integers.items() if v in widths and k not in mine}
        counts += [(module, mine)] if mine else []
        sizes += [(module, wide)] if wide else []
    numbers: list[list[tuple[nn.Module, dict[str, int]]]] = [[]]
    for candidate in (counts, [*counts, *sizes], sizes):
        if candidate not in numbers:
            numbers.append(candidate)
    ways = [(False, False), *([(False, True)] if heads else []), (True, False)]
    return [Adjustment(candidate, *way, rows if way[1] else frozenset()) for way in ways for candidate in numbers]


def _counts_heads(name: str) -> bool:
    return "head" in name and "dim" not in name and "size" not in name


@contextmanager
def adjusted(adjustment: Adjustment) -> Iterator[None]:
    """Within the block, modules have these numbers as attributes."""
    with ExitStack() as stack:
        for module, values in adjustment.numbers:
            stack.enter_context(replaced(module, **values))
        yield


@contextmanager
def dealing_positions(owner: nn.Module, heads: int, mesh: DeviceMesh) -> Iterator[None]:
    """Within the block, modules in ``owner`` that hold a number for each head (relative positions) give a part, and
    parameters of a number for each head (the sinks of gpt-oss) are this rank's."""
    with ExitStack() as stack:
        for module in owner.modules():
            stack.enter_context(_dealing_parameters(module, heads, mesh))
            if isinstance(module, nn.Embedding) and module.embedding_dim == heads:
                give = partial(_part_of_output, module.forward, mesh)
                stack.enter_context(replaced(module, forward=give))
            elif _holds_heads(module, heads) and "_tensor_split" not in vars(module) and module is not owner:
                give = partial(_heads_of_output, module.forward, heads, mesh)
                stack.enter_context(replaced(module, forward=give))
        yield


@contextmanager
def _dealing_parameters(module: nn.Module, heads: int, mesh: DeviceMesh) -> Iterator[None]:
    own = {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.numel() == heads and parameter.shape[:1] == (heads,)
        if not isinstance(parameter, DTensor)
    }
    try:
        for name, parameter in own.items():
            module._parameters[name] = take_part(parameter, mesh, 0)  # type: ignore[assignment]
        yield
    finally:
        module._parameters.update(own)


def _holds_heads(module: nn.Module, heads: int) -> bool:
    """Whether it has parameters of its own, a table or a list with something for each head."""
    return any(heads in parameter.shape for parameter in module.parameters(recurse=False))


def _part_of_output(call: Callable[..., Tensor], mesh: DeviceMesh, ids: Tensor) -> Tensor:
    return take_part(call(ids), mesh)


def _heads_of_output(call: Callable[..., Any], heads: int, mesh: DeviceMesh, *args: Any, **kwargs: Any) -> Any:
    return deal_heads(call(*args, **kwargs), heads, mesh)


def deal_arguments(args: Any, kwargs: Any, adjustment: Adjustment, heads: int, mesh: DeviceMesh) -> Any:
    """The arguments of a call, with this rank's heads of what they have for each."""
    args, kwargs = deal_heads((args, kwargs), heads, mesh)
    rows = {key: value for key, value in _arguments(args, kwargs) if key in adjustment.rows}
    # As (batch, heads, 1, length), of which heads are dealt out.
    parts = {
        key: take_part(value.unflatten(0, (-1, heads)), mesh, 1).flatten(0, 1)
        for key, value in rows.items()
        if is_row_of_heads(value, heads)
    }
    return tuple(parts.get(place, x) for place, x in enumerate(args)), {k: parts.get(k, x) for k, x in kwargs.items()}


def find_rows_of_heads(args: Any, kwargs: Any, heads: int) -> list[tuple[int | str, Tensor]]:
    """The arguments that may have a row for each head, by place or name."""
    return [(key, value) for key, value in _arguments(args, kwargs) if is_row_of_heads(value, heads)]


def is_row_of_heads(x: Any, heads: int) -> bool:
    """Whether it looks like ``(batch * heads, 1, length)``, as BLOOM and MPT have what they add to the scores."""
    return (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and x.ndim == 3
        and x.shape[1] == 1
        and x.shape[0] % heads == 0
    )


def _arguments(args: Any, kwargs: Any) -> list[tuple[int | str, Any]]:
    return [*enumerate(args), *kwargs.items()]


def deal_heads(tree: Any, heads: int, mesh: DeviceMesh) -> Any:
    """``tree`` with this rank's heads of its floating-point tensors ``(batch, heads, length, length)``."""
    return tree_map(lambda x: take_part(x, mesh, 1) if _has_heads(x, heads) else x, tree)


def gather_heads(tree: Any, heads: int, mesh: DeviceMesh) -> Any:
    """``tree`` with all ranks' heads of tensors ``(batch, heads, length, length)`` put together."""
    return tree_map(lambda x: gather(x, mesh, 1) if _has_heads(x, heads // mesh.size()) else x, tree)


def _has_heads(x: Any, heads: int) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 4 and x.shape[1] == heads


@contextmanager
def entering(parameters: Sequence[tuple[nn.Module, str]], mesh: DeviceMesh) -> Iterator[None]:
    """Within the block these whole parameters are used on parts: the ranks' gradients of them are added up."""
    whole = [(module, name, module._parameters[name]) for module, name in parameters]
    try:
        for module, name, parameter in whole:
            assert parameter is not None
            module._parameters[name] = enter(parameter, mesh)  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in whole:
            module._parameters[name] = parameter
