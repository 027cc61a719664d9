"""Work on a part of the features from the columns of one layer to the rows of another, once that is verified.

Layers that are split together start out gathering what lies between them, which is always right. At the first call
of the module that holds them it is found out, on the real inputs of that call, whether each rank could as well work
on its own part: the columns' outputs are replaced with random values, and what reaches the row must be the same,
part by part, with whole values and with parts. Code that was written for whole values can need smaller numbers on
the way (``num_heads``, ``split_size``); these are tried too. The parameters are split alike in either case, so
nothing but communication depends on the outcome.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lightning_memopt.models.linear_groups import LinearGroup
from lightning_memopt.models.linears import LinearShape
from lightning_memopt.parallel.pipeline.chain import holds_links
from lightning_memopt.parallel.tensor.adjust import (
    Adjustment,
    adjusted,
    deal_arguments,
    dealing_positions,
    entering,
    gather_heads,
)
from lightning_memopt.parallel.tensor.collectives import enter, gather_tokens
from lightning_memopt.parallel.tensor.trial import Trial, Verdict, verify

GATHERED = "not called yet, so what lies between its layers is gathered"
CUT = "a pipeline is cut within the module that holds its layers"


class Region:
    """The layers of one group, and how they hand over what lies between them.

    Attributes:
        group: Which layers.
        owner: The module that holds them.
        mesh: The tensor group.
        inputs: Features of what its columns take.
        width: Features between its columns and its row.
        is_local: Whether it was verified that ranks can work on parts.
        reason: Why they cannot (yet).
        splits_tokens: Whether what surrounds its owner has a part of the tokens.
        trial: Under way while it is being verified.
    """

    def __init__(self, group: LinearGroup, owner: nn.Module, mesh: DeviceMesh, shapes: Sequence[LinearShape]) -> None:
        self.group = group
        self.owner = owner
        self.mesh = mesh
        self.inputs = shapes[0].in_features
        self.width = shapes[-1].in_features
        self.is_local = group.is_proven
        self.reason = "" if group.is_proven else GATHERED
        self.splits_tokens = False
        self.trial: Trial | None = None
        self._verdict: Verdict | None = Verdict(with_gradients=True) if group.is_proven else None
        self._depth = 0
        self._entered: dict[int, tuple[Tensor, Tensor]] = {}
        self._narrowed: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def is_inside(self) -> bool:
        """Whether the layers called now hand over parts."""
        return self.is_local and self._depth > 0

    @property
    def entering(self) -> tuple[tuple[nn.Module, str], ...]:
        """Whole parameters used between its layers, as modules and names."""
        return self._verdict.entering if self._verdict is not None else ()

    @property
    def input_index(self) -> int | None:
        """Which of the owner's tensor arguments is its columns' input and nothing else."""
        return self._verdict.input_index if self._verdict is not None else None

    def enter(self, x: Tensor) -> Tensor:
        """``x`` for a column; columns that share it share the sum of its gradient too."""
        x = self.whole_of(x)
        if self.splits_tokens:
            return x  # its gradients are added up where its tokens were gathered
        if self._depth == 0:
            return enter(x, self.mesh)
        if id(x) not in self._entered:
            self._entered[id(x)] = (x, enter(x, self.mesh))
        return self._entered[id(x)][1]

    def whole_of(self, x: Tensor) -> Tensor:
        """What ``x`` stands for, if it is an input that was narrowed."""
        return self._narrowed[id(x)][1] if id(x) in self._narrowed else x

    def call_adjusted(self, adjustment: Adjustment, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The owner's call, its code adjusted to a part of the features."""
        try:
            with ExitStack() as stack:
                stack.enter_context(adjusted(adjustment))
                if adjustment.narrows:
                    args, kwargs = tree_map(self._narrow, (args, kwargs))
                if not adjustment.deals_heads:
                    return call(*args, **kwargs)
                assert self.group.heads is not None
                heads = self.group.heads.queries
                stack.enter_context(dealing_positions(self.owner, heads, self.mesh))
                args, kwargs = deal_arguments(args, kwargs, adjustment, heads, self.mesh)
                return gather_heads(call(*args, **kwargs), heads, self.mesh)
        finally:
            self._entered.clear()
            self._narrowed.clear()

    def _narrow(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
            return value
        if value.shape[-1] != self.inputs:
            return value
        shown = value.narrow(-1, 0, self.inputs // self.mesh.size())
        self._narrowed[id(shown)] = (shown, value)
        return shown

    def prepare(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Verify it at the owner's first call, on that call's inputs; all ranks of the group do."""
        needs_gradients = torch.is_grad_enabled()
        if self._verdict is not None and (self._verdict.with_gradients or not needs_gradients):
            return
        is_cut = holds_links(self.owner)
        self._verdict = Verdict(CUT, with_gradients=True) if is_cut else verify(self, call, args, kwargs)
        self.is_local, self.reason = not self._verdict.reason, self._verdict.reason

    def run(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The owner's call, its layers handing over parts if that was verified."""
        if not self.is_local or self._depth:
            return call(*args, **kwargs)
        assert self._verdict is not None
        self._depth += 1
        try:
            with entering(self._verdict.entering, self.mesh):
                if self.splits_tokens:
                    args, kwargs = self._with_all_tokens(args, kwargs)
                return self.call_adjusted(self._verdict.adjustment, call, args, kwargs)
        finally:
            self._depth -= 1

    def _with_all_tokens(self, args: Any, kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        assert self.input_index is not None
        place = places[self.input_index]
        leaves[place] = gather_tokens(leaves[place], self.mesh)
        return tree_unflatten(leaves, structure)


class RegionOwner(nn.Module):
    """In front of the class of a module that holds groups of split layers."""

    _tensor_regions: Sequence[Region] = ()
    """None in a module that code makes of the class of this one: `nn.Sequential` does where it is sliced."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own ``forward`` does."""
        call, regions = super().forward, self._tensor_regions
        if all(region.trial is None for region in regions):
            for region in regions:
                region.prepare(call, args, kwargs)
            for region in regions:
                call = partial(_run, region, call)
        return call(*args, **kwargs)


def _run(region: Region, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return region.run(call, args, kwargs)
