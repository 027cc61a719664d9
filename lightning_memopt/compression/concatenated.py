"""Features that are read several times over, side by side: a class token beside the mean of others, or four patches.

The dependency graph loses count of such copies. What a layer reads is compared with what layers before it gave: each
of its inputs depends on one output of one of them alone, and which that is, the gradients of one run show.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memopt.compression.slots import Slot, UnitGroup

SAMPLES = 8
"""Inputs of a layer that are looked at of each that the graph lost: whole copies follow from a few."""


def complete_copies(module: nn.Module, call: Callable[[nn.Module], Any], groups: Sequence[UnitGroup]) -> None:
    """Find whose copies the inputs are that ``groups`` know in part, and correct their slots.

    Args:
        module: A module that is ready to be followed; it is run once where there are any.
        call: Runs it.
        groups: Of the dependency graph.
    """
    partial = [group for group in groups if group.reason is None and any(_is_partial(group, s) for s in group.slots)]
    if not partial:
        return
    layers = {slot.module: None for group in partial for slot in group.slots}
    order: list[nn.Module] = []
    read: dict[nn.Module, Tensor] = {}
    given: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, inputs: Any, output: Any) -> None:
        if layer not in given and inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            order.append(layer)
            read[layer], given[layer] = inputs[0], output

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        call(module)
        for group in partial:
            _complete(group, order, read, given)
    except RuntimeError:  # gradients that cannot be asked for, as within a checkpoint: it is left as it was found
        return
    finally:
        for handle in handles:
            handle.remove()


def _is_partial(group: UnitGroup, slot: Slot) -> bool:
    """Whether the slot is of several copies of the group's units, of which some are not found."""
    count = len(slot.units)
    return count > group.size and count % group.size == 0 and bool((slot.units < 0).any())


def _complete(
    group: UnitGroup, order: Sequence[nn.Module], read: dict[nn.Module, Tensor], given: dict[nn.Module, Tensor]
) -> None:
    for place, layer in enumerate(order):
        mine = [slot for slot in group.slots if slot.module is layer and _is_partial(group, slot)]
        if not mine:
            continue
        count = len(mine[0].units)
        for source in reversed(order[:place]):
            known = [s.units for s in group.slots if s.module is source and len(s.units) == given[source].shape[-1]]
            units = _copied(read[layer], given[source], known[-1], count) if known else None
            if units is not None:
                group.slots = [
                    Slot(layer, slot.name, slot.dimension, units) if slot in mine else slot for slot in group.slots
                ]
                break


def _copied(inputs: Tensor, source: Tensor, units: Tensor, count: int) -> Tensor | None:
    """The unit of each of ``inputs``, if these are copies of ``source``, features side by side or each repeated."""
    size = source.shape[-1]
    if inputs.shape[-1] != count or count % size or not (inputs.requires_grad and source.requires_grad):
        return None
    places = torch.arange(count)
    samples = torch.linspace(0, count - 1, SAMPLES).long().unique().tolist()
    found = {}
    for sample in samples:
        gradient = torch.autograd.grad(inputs[..., sample].sum(), source, retain_graph=True, allow_unused=True)[0]
        used = [] if gradient is None else (gradient != 0).flatten(0, -2).any(0).nonzero().view(-1).tolist()
        if len(used) != 1:
            return None
        found[sample] = used[0]
    for way in (places % size, places // (count // size)):
        if all(int(way[sample]) == feature for sample, feature in found.items()):
            return units[way]
    return None
