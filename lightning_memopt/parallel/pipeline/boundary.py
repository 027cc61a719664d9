"""What crosses from one stage to the next: each argument of the next stage's first link that has no data there."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten

from lightning_memopt.parallel.pipeline.chain import Chain
from lightning_memopt.parallel.pipeline.recompute import Recomputation, is_checkpointed
from lightning_memopt.parallel.pipeline.stubs import is_stub
from lightning_memopt.parallel.refusal import StepRefused

_PACKAGE = __name__.partition(".")[0]
"""Its own hooks collect nothing that steps read."""


class StageDone(BaseException):
    """Unwinds the user's step behind the last link of a stage; no ``except Exception`` of the user's catches it.

    Attributes:
        tensors: What the next stage is sent.
    """

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.tensors = tensors


@dataclass
class Boundary:
    """What a stage is sent.

    Attributes:
        slots: Of each leaf of the arguments of its first link, the number of the tensor that replaces it.
        metas: Of each tensor, one like it on the meta device, contiguous.
    """

    slots: dict[int, int] = field(default_factory=dict)
    metas: list[Tensor] = field(default_factory=list)


@dataclass
class Shapes:
    """What micro-batches of one kind have in common.

    Attributes:
        boundaries: Of each stage but the first.
        outputs: What each link returned, where that is stubs only, and so is the same for each micro-batch.
        direct: Links of this rank that got nothing in which a stub had to be replaced, as a stage ran them.
    """

    boundaries: dict[int, Boundary] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    direct: set[int] = field(default_factory=set)


def shapes_of_stages(boundaries: Sequence[Boundary], outputs: dict[int, Any], starts: Sequence[int]) -> Shapes:
    """Of what each link got and returned, what matters where stages begin with links ``starts``."""
    before_last = {index: output for index, output in outputs.items() if index < starts[-1]}
    return Shapes({stage: boundaries[start] for stage, start in enumerate(starts) if stage}, before_last)


class ShapeReader:
    """Observes a step on a shadow of which every parameter is a stub, up to the last stage's first link."""

    def __init__(self, starts: Sequence[int], links: Sequence[nn.Module]) -> None:
        self.shapes = Shapes()
        self._links = links
        self._stages = {start: stage for stage, start in enumerate(starts) if stage}

    def called(self, index: int, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take down what link ``index`` gets and returns."""
        if index in self._stages:
            stage = self._stages.pop(index)
            self.shapes.boundaries[stage] = read_boundary(args, kwargs)
            if not self._stages:
                raise StageDone(())
        output = call(*args, **kwargs)
        if can_stand_for(self._links[index], output):
            self.shapes.outputs[index] = output
        return output


def read_shapes(shadow: nn.Module, names: Sequence[str], starts: Sequence[int], run: Callable[[], Any]) -> Shapes:
    """Learn what crosses each boundary for one kind of micro-batch; ``run`` runs a step on ``shadow``.

    Raises:
        StepRefused: The step does not call the links that stages begin with.
    """
    links = [shadow.get_submodule(name) for name in names]
    reader = ShapeReader(starts, links)
    chain = Chain(links)
    chain.observer = reader
    try:
        run()
    except StageDone:
        return reader.shapes
    finally:
        chain.observer = None
        chain.remove()
    missing = [names[start] for start in starts if start and start in reader._stages]
    raise StepRefused(f"the step does not call `{missing[0]}`, which a stage begins with.")


def can_stand_for(link: nn.Module, output: Any) -> bool:
    """Whether stages behind ``link`` may take what it returned instead of calling it: it has no data and no hooks.

    Hooks of others may collect what passes (transformers collects hidden states so), which the step then reads.
    """
    hooks = [
        hook for part in link.modules() for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
    ]
    is_collected = any(not str(getattr(hook, "__module__", "")).startswith(f"{_PACKAGE}.") for hook in hooks)
    return not is_collected and all(is_stub(leaf) for leaf in tree_iter(output) if isinstance(leaf, Tensor))


def read_boundary(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Boundary:
    """What a stage would be sent whose first link is called with these arguments."""
    boundary = Boundary()
    known: dict[int, int] = {}
    for position, leaf in enumerate(tree_flatten((args, kwargs))[0]):
        if not is_stub(leaf):
            continue
        if id(leaf) not in known:
            known[id(leaf)] = len(boundary.metas)
            meta = torch.empty(leaf.shape, dtype=leaf.dtype, device="meta", requires_grad=leaf.requires_grad)
            boundary.metas.append(meta)
        boundary.slots[position] = known[id(leaf)]
    return boundary


class StageRun:
    """Observes one stage's run of the user's step on one micro-batch.

    Args:
        links: The stage's own.
        names: Of all links.
        shapes: Of this kind of micro-batch.
        stage: The number of the stage.
        received: What it was sent.

    Attributes:
        recomputation: For the backward, where the step calls a link that got a received tensor within a checkpoint.
    """

    def __init__(
        self, links: range, names: Sequence[str], shapes: Shapes, stage: int, received: tuple[Tensor, ...]
    ) -> None:
        self._links = links
        self._names = names
        self._shapes = shapes
        self._stage = stage
        self._received = received
        self._in_place_of: dict[int, tuple[Any, Tensor]] = {}  # by id of a stub, which is kept alive
        self._next = 0
        self._replaced: dict[int, dict[int, Tensor]] = {}
        self.recomputation: Recomputation | None = None

    def called(self, index: int, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pass over links of earlier stages, run own ones on real values, and stop at the next stage's first."""
        if index != self._next:
            raise StepRefused(
                f"`{self._names[index]}` was called where `{self._names[self._next]}` was before: the step calls "
                "its blocks in another order than in its first run, and a pipeline needs the same each time (no "
                "skipped layers)."
            )
        self._next += 1
        if index < self._links.start:
            if index in self._shapes.outputs:
                return self._shapes.outputs[index]
            return call(*args, **kwargs)
        if index in self._shapes.direct:  # taking arguments apart costs more than all else that is done here
            return call(*args, **kwargs)
        leaves, tree = tree_flatten((args, kwargs))
        if index == self._links.start and self._stage:
            for position, slot in self._shapes.boundaries[self._stage].slots.items():
                self._in_place_of[id(leaves[position])] = (leaves[position], self._received[slot])
        real = [self._in_place_of[id(leaf)][1] if id(leaf) in self._in_place_of else leaf for leaf in leaves]
        if index == self._links.stop:
            raise StageDone(self._collect(real, index))
        if all(map(operator.is_, real, leaves)):
            self._shapes.direct.add(index)
        elif is_checkpointed():  # asked here alone, since it takes a walk over the stack
            pairs = enumerate(zip(leaves, real, strict=True))
            self._replaced[index] = {position: value for position, (leaf, value) in pairs if value is not leaf}
            self.recomputation = Recomputation(self._links.start, self._shapes.outputs, self._replaced)
        args, kwargs = tree_unflatten(real, tree)
        return call(*args, **kwargs)

    def _collect(self, leaves: list[Any], index: int) -> tuple[Tensor, ...]:
        boundary = self._shapes.boundaries[self._stage + 1]
        tensors: list[Any] = [None] * len(boundary.metas)
        for position, slot in boundary.slots.items():
            if is_stub(leaves[position]):
                raise StepRefused(
                    f"`{self._names[index]}` gets a tensor of shape {tuple(leaves[position].shape)} that comes from "
                    "an earlier stage by another way than through the arguments of blocks, so it cannot be sent."
                )
            tensors[slot] = leaves[position].contiguous()
        return tuple(tensors)

    def check_finished(self) -> None:
        """Raise :class:`StepRefused` if the step ended before it called all of the stage's links."""
        if self._next < self._links.stop:
            raise StepRefused(
                f"the step ended before it called `{self._names[self._next]}`; a pipeline needs each block in each "
                "step."
            )
