"""Choose the regions of a model that are recomputed as one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, isqrt

from torch import nn

from lightning_memopt.models.blocks import find_block_stacks
from lightning_memopt.models.selectors import Selector, as_selectors, matches, show


@dataclass(frozen=True)
class Region:
    """A part of the model that is run as one and recomputed as one.

    Attributes:
        name: Qualified name of the module, or ``"net[0:3]"`` for children 0 to 2 of the ``nn.Sequential`` ``net``.
        module: The module; for a segment a detached ``nn.Sequential`` of the children.
        is_block: Whether it is a block (or was chosen by the user) and not a fallback.
        index: Its place among its siblings, from 0.
        sequential: For a segment, the ``nn.Sequential`` whose ``forward`` runs it.
    """

    name: str
    module: nn.Module
    is_block: bool = True
    index: int = 0
    sequential: nn.Sequential | None = None


def select_regions(module: nn.Module, modules: Selector | Sequence[Selector] | None = None) -> list[Region]:
    """Find what to checkpoint in ``module``.

    With ``modules`` given, every submodule of one of the classes, or whose qualified name matches one of the patterns
    (:func:`fnmatch.fnmatchcase`); of nested matches the outermost. Otherwise the first of these that exists:

    1. the blocks of every stack (:func:`~lightning_memopt.models.blocks.find_block_stacks`);
    2. blocks that are alone in an ``nn.ModuleList``, which a model may call again and again (ALBERT);
    3. every ``nn.Sequential`` of three or more layers, cut into about sqrt(n) segments of equal length
       (Chen et al. 2016, https://arxiv.org/abs/1604.06174: that many segments minimize checkpoints plus the
       segment being recomputed); no cut is made before a layer that changes its input in place;
    4. recurrent layers, whose fused kernels keep a large workspace.

    Raises:
        ValueError: Nothing matches, or a match is a container that is never called.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
        >>> [region.name for region in select_regions(net)]
        ['[0:2]', '[2:4]']
    """
    if modules is not None:
        return _matching(module, as_selectors(modules))
    stacks = find_block_stacks(module)
    if stacks:
        return [
            Region(name, block, index=index)
            for stack in stacks
            for index, (name, block) in enumerate(zip(stack.names, stack.blocks, strict=True))
        ]
    if alone := list(_alone_in_a_list(module)):
        return [Region(name, block, index=index) for index, (name, block) in enumerate(alone)]
    regions = [segment for name, sequential in _sequentials(module) for segment in _segments(name, sequential)]
    if not regions:
        regions = [Region(n, m, is_block=False) for n, m in module.named_modules() if isinstance(m, nn.RNNBase)]
    if not regions:
        raise ValueError(
            f"{type(module).__name__} has no repeated blocks, no nn.Sequential of three or more layers and no "
            "recurrent layer, so there is nothing to checkpoint by default; name submodules with modules="
        )
    return regions


def _matching(root: nn.Module, selectors: list[Selector]) -> list[Region]:
    found: dict[str, nn.Module] = {}
    for selector in selectors:
        matching = {name: m for name, m in root.named_modules() if name and matches(name, m, selector)}
        if not matching:
            names = [name for name, _ in root.named_modules() if name]
            raise ValueError(
                f"modules={show(selector)!r} matches no submodule of {type(root).__name__}; "
                f"its submodules are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )
        found |= matching
    for name, match in found.items():
        if isinstance(match, nn.ModuleList | nn.ModuleDict):
            raise ValueError(
                f"{name} is an {type(match).__name__}, which is never called and so cannot be recomputed; "
                f"select what it holds, for example modules='{name}.*'"
            )
    outermost = {n: m for n, m in found.items() if not any(n.startswith(f"{other}.") for other in found)}
    return [Region(name, match, index=index) for index, (name, match) in enumerate(outermost.items())]


def _alone_in_a_list(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    children = list(module.named_children())
    for child_name, child in children:
        qualified = f"{name}.{child_name}" if name else child_name
        is_composite = next(child.children(), None) is not None and not isinstance(
            child, nn.ModuleList | nn.ModuleDict | nn.Sequential
        )
        if isinstance(module, nn.ModuleList) and len(children) == 1 and is_composite:
            yield qualified, child
        else:
            yield from _alone_in_a_list(child, qualified)


def _sequentials(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Sequential]]:
    if isinstance(module, nn.Sequential) and len(module) > 2 and type(module).forward is nn.Sequential.forward:
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _sequentials(child, f"{name}.{child_name}" if name else child_name)


def _segments(name: str, sequential: nn.Sequential) -> Iterator[Region]:
    children = list(sequential.named_children())
    length = ceil(len(children) / isqrt(len(children)))
    starts = [i for i in range(0, len(children), length) if i == 0 or not getattr(children[i][1], "inplace", False)]
    for index, (start, end) in enumerate(pairwise([*starts, len(children)])):
        segment = nn.Sequential(*(child for _, child in children[start:end]))
        yield Region(f"{name}[{start}:{end}]", segment, False, index, sequential)
