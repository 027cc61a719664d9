"""Make a module's code, written for whole values, run on a part of the features."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_memopt.models.instance_patch import replaced
from lightning_memopt.models.linear_groups import LinearGroup
from lightning_memopt.parallel.tensor.collectives import enter

Numbers = Sequence[tuple[nn.Module, dict[str, int]]]
"""Modules, and what some of their integer attributes are to be."""


def possible_numbers(group: LinearGroup, owner: nn.Module, width: int, size: int) -> list[Numbers]:
    """What the attributes of ``owner`` and its parts may have to be on one of ``size`` ranks, to be tried in order.

    ``width`` is the number of features between the layers of ``group``. First nothing is changed: code that views heads with ``-1`` needs nothing. Then numbers of heads
    (``num_heads``), then widths as well (``split_size``, ``embed_dim``), then widths alone.
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
    candidates: list[Numbers] = [[]]
    for candidate in (counts, [*counts, *sizes], sizes):
        if candidate and candidate not in candidates:
            candidates.append(candidate)
    return candidates


def _counts_heads(name: str) -> bool:
    return "head" in name and "dim" not in name and "size" not in name


@contextmanager
def adjusted(numbers: Numbers) -> Iterator[None]:
    """Within the block, modules have these numbers as attributes."""
    with ExitStack() as stack:
        for module, values in numbers:
            stack.enter_context(replaced(module, **values))
        yield


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
