"""Trace a deep model with a few of its blocks, and say what all of them would make of it.

Memory at any place of a step is linear in the number of equal blocks as long as the place is so many blocks from the
first or from the last. So two depths tell every depth. Where the places of the two traces do not match, nothing is
said, and the whole model is to be traced.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from lightning_memopt.memory.report import TimelinePoint
from lightning_memopt.models.blocks import find_block_stacks

SHALLOW = 3
"""Blocks of the shallower trace: a first, a last and one between; the other has one more."""

_WORTH_IT = 6

Key = tuple[int, str, str]
Row = TypeVar("Row", bound=tuple)


@dataclass(frozen=True)
class Stack:
    """The blocks that are left out.

    Attributes:
        holder: Qualified name of the container.
        keys: Names of the blocks in it.
    """

    holder: str
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def names(self) -> tuple[str, ...]:
        """Qualified names of the blocks."""
        prefix = f"{self.holder}." if self.holder else ""
        return tuple(f"{prefix}{key}" for key in self.keys)

    def of_stage(self, start: int, blocks: int) -> "Stack":
        """Those of them that a stage of a pipeline has."""
        return Stack(self.holder, self.keys[start : start + blocks])


def find_deep_stack(module: nn.Module) -> Stack | None:
    """The largest stack of ``module``, if it is deep and its blocks are alike."""
    for stack in find_block_stacks(module)[:1]:
        shapes = {tuple((name, p.shape, p.dtype) for name, p in block.named_parameters()) for block in stack.blocks}
        if len(stack) >= _WORTH_IT and len(shapes) == 1:
            prefix = len(stack.name) + 1 if stack.name else 0
            return Stack(stack.name, tuple(name[prefix:] for name in stack.names))
    return None


@contextmanager
def with_blocks(module: nn.Module, stack: Stack, count: int) -> Iterator[None]:
    """Within the block ``module`` has only the first ``count`` blocks of ``stack``."""
    holder = module.get_submodule(stack.holder)
    everything = dict(holder._modules)
    cut(module, stack, count)
    try:
        yield
    finally:
        holder._modules.clear()
        holder._modules.update(everything)


def cut(module: nn.Module, stack: Stack, count: int) -> None:
    """Leave ``module`` only the first ``count`` blocks of ``stack``."""
    holder = module.get_submodule(stack.holder)
    for key in stack.keys[count:]:
        holder._modules.pop(key, None)  # it may be cut already


def extrapolate_points(
    shallow: Sequence[TimelinePoint], deep: Sequence[TimelinePoint], traced: Stack, blocks: int
) -> tuple[TimelinePoint, ...] | None:
    """The largest points of each place with all blocks; ``None`` where the two traces have other places.

    Args:
        shallow: Of a model with so few of them.
        deep: Of one with one more.
        traced: The blocks of the deep one.
        blocks: How many all are.
    """
    first, second = _places(shallow, traced, SHALLOW), _places(deep, traced, SHALLOW + 1)
    if first.keys() != second.keys():
        return None
    more = blocks - SHALLOW
    points = []
    for key, point in first.items():
        grown = second[key].by_category
        by_category = {name: max(0, size + more * (grown[name] - size)) for name, size in point.by_category.items()}
        points.append(TimelinePoint(point.phase, point.module, by_category))
    return tuple(points)


def extrapolate_times(shallow: Sequence[Row], deep: Sequence[Row], blocks: int) -> list[Row]:
    """Rows whose last field says how often, for all blocks; what one of the traces lacks is taken as it is."""
    before = {row[:-1]: row for row in shallow}
    more = blocks - SHALLOW
    rows = []
    for row in deep:
        earlier = before.get(row[:-1])
        times = row[-1] if earlier is None else earlier[-1] + more * (row[-1] - earlier[-1])
        rows.append(row._replace(times=max(times, 0)))  # type: ignore[attr-defined]
    return rows


def _places(points: Sequence[TimelinePoint], stack: Stack, count: int) -> dict[Key, TimelinePoint]:
    """Of each place in a step its largest point.

    A place is a pass (micro-batches make several), a phase, and a module outside the stack or a block, by its
    distance from the first or the last. What runs under no module's name belongs to the module before it.
    """
    prefix = f"{stack.holder}." if stack.holder else ""
    blocks = {name: index for index, name in enumerate(stack.names[:count])}
    found: dict[Key, TimelinePoint] = {}
    passes, phase = 0, ""
    where: tuple[str, ...] = ("",)
    for point in points:
        if point.phase != phase:
            passes += point.phase == "forward"
            phase, where = point.phase, (f"before {point.phase}",)
        index = _block_of(point.module, blocks)
        if index is not None:
            where = (f"first + {index}",) * (index < 2) + (f"last - {count - 1 - index}",) * (index > count - 3)
        elif point.module and not prefix.startswith(f"{point.module}."):
            where = (point.module,)
        for place in where if phase in ("forward", "backward") else ("",):
            key = (passes, phase, place)
            if key not in found or point.total_bytes > found[key].total_bytes:
                found[key] = point
    return found


def _block_of(module: str, blocks: dict[str, int]) -> int | None:
    while module:
        if module in blocks:
            return blocks[module]
        module = module.rpartition(".")[0]
    return None
