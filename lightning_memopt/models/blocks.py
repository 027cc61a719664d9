"""Find the repeated blocks of a model: the one place that every technique asks.

A *stack* is a run of sibling modules of one class, each with parameters and with submodules of its own
(transformer layers, residual blocks). Checkpointing recomputes per block, sharding wraps per block, a pipeline is
cut between blocks.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class BlockStack:
    """Sibling blocks of one class, in the order in which they are registered.

    Attributes:
        name: Qualified name of the module that holds the blocks (``"model.transformer.h"``); ``""`` for the root.
        names: Qualified names of the blocks.
        blocks: The blocks themselves.
    """

    name: str
    names: tuple[str, ...]
    blocks: tuple[nn.Module, ...]

    @property
    def parameter_count(self) -> int:
        """Number of parameter elements in all blocks together, tied ones counted once."""
        return sum(p.numel() for p in {p for block in self.blocks for p in block.parameters()})

    def __len__(self) -> int:
        return len(self.blocks)


def find_block_stacks(module: nn.Module) -> list[BlockStack]:
    """Find the block stacks of ``module``, the one that holds the most parameters first.

    Stacks never nest: the outermost is taken, except where its blocks differ in size and hold stacks of their own
    (the stages of a ResNet or a Swin transformer), in which case the inner ones are; a stage with only one such block
    gives a stack of that one. Siblings that are plain attributes (``self.block1``, ``self.block2``) count only where
    no container (``nn.ModuleList``, ``nn.Sequential``, ``nn.ModuleDict``) below them holds a stack. What is one layer
    with its norm and activation is no block within another: a residual block of two of them is one block.

    Args:
        module: Any module; it is only read.

    Returns:
        The stacks, possibly none. Encoder-decoders have two.

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), num_layers=3)
        >>> [stack.names for stack in find_block_stacks(encoder)]
        [('layers.0', 'layers.1', 'layers.2')]
    """
    return sorted(_stacks_below(module, ""), key=lambda stack: -stack.parameter_count)


def _stacks_below(module: nn.Module, name: str) -> Iterator[BlockStack]:
    own = _sibling_stacks(module, name)
    is_container = isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict)
    inner_of_own = [list(_stacks_below_blocks(stack)) for stack in own]
    taken: set[nn.Module] = set()
    for stack, inner in zip(own, inner_of_own, strict=True):
        taken.update(stack.blocks)
        if inner and (not is_container or _differ_in_size(stack)):
            yield from inner
        else:
            yield stack
    for child_name, child in module.named_children():
        if child not in taken:
            yield from _stacks_below(child, _join(name, child_name))


def _stacks_below_blocks(stages: BlockStack) -> Iterator[BlockStack]:
    """The stacks within stages, and the blocks of a stage that has one where the others have several."""
    inner = [
        [stack for stack in _stacks_below(stage, name) if all(map(_has_two_layers, stack.blocks))]
        for name, stage in zip(stages.names, stages.blocks, strict=True)
    ]
    places = {
        (stack.name.removeprefix(name).lstrip("."), type(stack.blocks[0]))
        for name, stacks in zip(stages.names, inner, strict=True)
        for stack in stacks
    }
    outermost_first = sorted(places, key=lambda place: place[0].count("."))
    for name, stage, stacks in zip(stages.names, stages.blocks, inner, strict=True):
        for place, kind in outermost_first:
            alone = _only_child(stage, name, place, kind)
            if alone is not None and not any(_is_within(alone.names[0], stack) for stack in stacks):
                stacks = [*(stack for stack in stacks if not _is_within(stack.name, alone)), alone]
        yield from stacks


def _only_child(stage: nn.Module, name: str, place: str, kind: type[nn.Module]) -> BlockStack | None:
    holder = dict(stage.named_modules()).get(place)
    found = [] if holder is None else [(n, child) for n, child in holder.named_children() if type(child) is kind]
    if len(found) != 1:
        return None
    [(child_name, child)] = found
    return BlockStack(_join(name, place), (_join(_join(name, place), child_name),), (child,))


def _has_two_layers(block: nn.Module) -> bool:
    """Whether it is more than one layer with its norm and activation."""
    layers = [m for m in block.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))]
    return len(layers) > 1


def _is_within(name: str, stack: BlockStack) -> bool:
    return any(name == block or name.startswith(f"{block}.") for block in stack.names)


def _sibling_stacks(module: nn.Module, name: str) -> list[BlockStack]:
    by_class: dict[type[nn.Module], dict[str, nn.Module]] = defaultdict(dict)
    for child_name, child in module.named_children():
        has_parameters = next(child.parameters(), None) is not None
        is_composite = next(child.children(), None) is not None
        if has_parameters and is_composite and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            by_class[type(child)][_join(name, child_name)] = child
    return [BlockStack(name, tuple(group), tuple(group.values())) for group in by_class.values() if len(group) > 1]


def _differ_in_size(stack: BlockStack) -> bool:
    return len({sum(p.numel() for p in block.parameters()) for block in stack.blocks}) > 1


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
