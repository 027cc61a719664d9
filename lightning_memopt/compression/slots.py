"""Where units lie in the tensors of a module: what a channel, a neuron or a head is made of."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_memopt.models.heads import Heads


@dataclass(frozen=True, eq=False)
class Slot:
    """Where units lie in one tensor.

    Attributes:
        module: The module that holds the tensor.
        name: Its name there.
        dimension: The dimension along which units lie.
        units: Which unit each place along it belongs to, ``-1`` for none of these: ``(size of the dimension,)``.
    """

    module: nn.Module
    name: str
    dimension: int
    units: Tensor

    @property
    def tensor(self) -> Tensor:
        """The tensor as it is now."""
        return getattr(self.module, self.name)


@dataclass(eq=False)
class UnitGroup:
    """Units that can be removed one by one, each from all tensors at once.

    Attributes:
        name: Qualified name of the layer whose outputs they are, or of the attention whose heads they are.
        kind: ``"channels"`` within the model, ``"heads"``, or ``"width"`` of a stream that attentions write to.
        size: How many there are.
        slots: Where they lie.
        heads: Of an attention.
        multiple: What the number that is left is a multiple of, since kernels take no other.
        reason: Why they cannot be removed, if so.
    """

    name: str
    kind: Literal["channels", "heads", "width"]
    size: int
    slots: list[Slot] = field(default_factory=list)
    heads: Heads | None = None
    multiple: int = 1
    reason: str | None = None


def join_tied(groups: Sequence[UnitGroup]) -> list[UnitGroup]:
    """``groups``, of which those are one that hold the same dimension of the same tensor, which is tied."""
    joined: list[UnitGroup] = []
    for group in groups:
        for other in [one for one in joined if _shared(one, group)]:
            if group.reason is None and other.reason is None:
                group = _as_one(other, group)
            else:
                group.reason = other.reason = group.reason or other.reason
                continue
            joined.remove(other)
        joined.append(group)
    return joined


def _shared(one: UnitGroup, other: UnitGroup) -> tuple[Slot, Slot] | None:
    """Slots of two groups that are of the same places of a tensor."""
    places = {(id(slot.tensor), slot.dimension): slot for slot in one.slots}
    for slot in other.slots:
        same = places.get((id(slot.tensor), slot.dimension))
        if same is not None and ((same.units >= 0) & (slot.units >= 0)).any():
            return same, slot
    return None


def _as_one(one: UnitGroup, other: UnitGroup) -> UnitGroup:
    """Both, by the units of ``one``; with a reason where those of the other are other units."""
    pair = _shared(one, other)
    assert pair is not None
    kept, renamed = pair
    units = torch.full((other.size,), -1)
    units[renamed.units] = kept.units
    kind: Literal["channels", "width"] = "width" if "width" in (one.kind, other.kind) else "channels"
    slots = [
        Slot(slot.module, slot.name, slot.dimension, torch.where(slot.units < 0, -1, units[slot.units.clamp_min(0)]))
        for slot in other.slots
    ]
    group = UnitGroup(one.name, kind, one.size, [*one.slots, *slots])
    if one.size != other.size or (kept.units < 0).any() or len(units.unique()) != one.size or (units < 0).any():
        group.reason = f"it is tied to {other.name!r}, of which other features are counted as one"
    return group
