"""Work on a part of the features from the columns of one layer to the rows of another, once that is verified.

Layers that are split together start out gathering what lies between them, which is always right. At the first call
of the module that holds them it is found out, on the real inputs of that call, whether each rank could as well work
on its own part: the columns' outputs are replaced with random values, and what reaches the row must be the same,
part by part, with whole values and with parts. Code that was written for whole values can need smaller numbers on
the way (``num_heads``, ``split_size``); these are tried too. The parameters are split alike in either case, so
nothing but communication depends on the outcome.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_memopt.models.linear_groups import LinearGroup
from lightning_memopt.parallel.tensor.adjust import adjusted, entering
from lightning_memopt.parallel.tensor.collectives import enter
from lightning_memopt.parallel.tensor.trial import Trial, Verdict, verify

GATHERED = "not called yet, so what lies between its layers is gathered"


class Region:
    """The layers of one group, and how they hand over what lies between them.

    Attributes:
        group: Which layers.
        owner: The module that holds them.
        mesh: The tensor group.
        width: Features between its columns and its row.
        is_local: Whether it was verified that ranks can work on parts.
        reason: Why they cannot (yet).
        trial: Under way while it is being verified.
    """

    def __init__(self, group: LinearGroup, owner: nn.Module, mesh: DeviceMesh, width: int) -> None:
        self.group = group
        self.owner = owner
        self.mesh = mesh
        self.width = width
        self.is_local = group.is_proven
        self.reason = "" if group.is_proven else GATHERED
        self.trial: Trial | None = None
        self._verdict: Verdict | None = Verdict(with_gradients=True) if group.is_proven else None
        self._depth = 0
        self._entered: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def is_inside(self) -> bool:
        """Whether the layers called now hand over parts."""
        return self.is_local and self._depth > 0

    def enter(self, x: Tensor) -> Tensor:
        """``x`` for a column; columns that share it share the sum of its gradient too."""
        if self._depth == 0:
            return enter(x, self.mesh)
        if id(x) not in self._entered:
            self._entered[id(x)] = (x, enter(x, self.mesh))
        return self._entered[id(x)][1]

    def prepare(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Verify it at the owner's first call, on that call's inputs; all ranks of the group do."""
        needs_gradients = torch.is_grad_enabled()
        if self._verdict is not None and (self._verdict.with_gradients or not needs_gradients):
            return
        self._verdict = verify(self, call, args, kwargs)
        self.is_local, self.reason = not self._verdict.reason, self._verdict.reason

    @contextmanager
    def within(self) -> Iterator[None]:
        """While the owner runs."""
        if not self.is_local or self._depth:
            yield
            return
        assert self._verdict is not None
        self._depth += 1
        try:
            with adjusted(self._verdict.numbers), entering(self._verdict.entering, self.mesh):
                yield
        finally:
            self._depth -= 1
            self._entered.clear()


class RegionOwner(nn.Module):
    """In front of the class of a module that holds groups of split layers."""

    _tensor_regions: list[Region]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own ``forward`` does."""
        regions = self._tensor_regions
        if any(region.trial is not None for region in regions):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        for region in regions:
            region.prepare(super().forward, args, kwargs)  # type: ignore[misc]
        return _run_within(regions, super().forward, args, kwargs)  # type: ignore[misc]


def _run_within(
    regions: list[Region], call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if not regions:
        return call(*args, **kwargs)
    with regions[0].within():
        return _run_within(regions[1:], call, args, kwargs)
