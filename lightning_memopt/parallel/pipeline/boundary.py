"""What crosses from one stage to the next: each argument of the next stage's first link that has no data there, and
what else the next stages use."""

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch.utils._pytree import tree_flatten, tree_iter, tree_leaves, tree_unflatten

from lightning_memopt.parallel.pipeline.carried import Output, put
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
        carried: Of each output of a module that is sent besides, the number of the tensor that replaces it.
        metas: Of each tensor, one like it on the meta device, contiguous.
    """

    slots: dict[int, int] = field(default_factory=dict)
    carried: dict[Output, int] = field(default_factory=dict)
    metas: list[Tensor] = field(default_factory=list)


@dataclass
class Shapes:
    """What micro-batches of one kind have in common.

    Attributes:
        boundaries: Of each stage but the first.
        outputs: What each link returned that may be taken instead of calling it, the same for each micro-batch.
        direct: Links that got nothing in which a stub had to be replaced, as a stage of this rank ran them.
    """

    boundaries: dict[int, Boundary] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    direct: set[int] = field(default_factory=set)


def shapes_of_stages(
    boundaries: Sequence[Boundary], outputs: dict[int, Any], starts: Sequence[int], called: Collection[int]
) -> Shapes:
    """Of what each link got and returned, what matters where stages begin with links ``starts``, and each has to call
    the links ``called``."""
    before_last = {i: output for i, output in outputs.items() if i < starts[-1] and i not in called}
    return Shapes({stage: boundaries[start] for stage, start in enumerate(starts) if stage}, before_last)


class ShapeReader:
    """Observes a step on a shadow of which every parameter is a stub, up to the last stage's first link.

    Args:
        known: The shapes of another kind of micro-batch.
        starts: The link that each stage begins with.
        links: All of them.
    """

    def __init__(self, known: Shapes, starts: Sequence[int], links: Sequence[nn.Module]) -> None:
        self.shapes = Shapes()
        self._known = known
        self._links = links
        self._values: dict[str, Any] = {}
        self._stages = {start: stage for stage, start in enumerate(starts) if stage}

    def returned(self, name: str, output: Any) -> None:
        """Keep what is carried."""
        self._values[name] = tree_leaves(output)

    def called(self, index: int, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take down what link ``index`` gets and returns."""
        for start in [start for start in self._stages if start <= index]:  # several where blocks are skipped
            stage = self._stages.pop(start)
            carried = [output for output in self._known.boundaries[stage].carried if output[0] in self._values]
            values = {(name, number): self._values[name][number] for name, number in carried}
            self.shapes.boundaries[stage] = read_boundary(args, kwargs, values)
        if not self._stages:
            raise StageDone(())
        output = call(*args, **kwargs)
        if index in self._known.outputs and can_stand_for(self._links[index], output):
            self.shapes.outputs[index] = output
        return output


def read_shapes(
    shadow: nn.Module, names: Sequence[str], starts: Sequence[int], known: Shapes, run: Callable[[], Any]
) -> Shapes:
    """Learn what crosses each boundary for one kind of micro-batch; ``run`` runs a step on ``shadow``.

    Raises:
        StepRefused: The step does not call the links that stages begin with.
    """
    links = [shadow.get_submodule(name) for name in names]
    reader = ShapeReader(known, starts, links)
    chain = Chain(links, {name: shadow.get_submodule(name) for name in watched_in(known)})
    chain.observer = reader
    try:
        run()
    except StageDone:
        return reader.shapes
    finally:
        chain.observer = None
        chain.remove()
    missing = [names[start] for start in starts if start and start in reader._stages]
    raise StepRefused(
        f"the step calls neither `{missing[0]}`, which a stage begins with, nor a block behind it, and a rank holds "
        "the layers of its stages alone, so each step has to pass through all of them. Compute what needs no blocks "
        "in a hook (`on_validation_epoch_end`), run the blocks too, or use `memopt_zero3`."
    )


def watched_in(shapes: Shapes) -> set[str]:
    """The modules of which an output is carried."""
    return {name for boundary in shapes.boundaries.values() for name, _ in boundary.carried}


def can_stand_for(link: nn.Module, output: Any) -> bool:
    """Whether stages behind ``link`` may take what it returned instead of calling it: it has no data and no hooks.

    Hooks of others may collect what passes (transformers collects hidden states so), which the step then reads.
    """
    hooks = [
        hook for part in link.modules() for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
    ]
    is_collected = any(not str(getattr(hook, "__module__", "")).startswith(f"{_PACKAGE}.") for hook in hooks)
    return not is_collected and all(is_stub(leaf) for leaf in tree_iter(output) if isinstance(leaf, Tensor))


def read_boundary(args: tuple[Any, ...], kwargs: dict[str, Any], carried: Mapping[Output, Any]) -> Boundary:
    """What a stage would be sent whose first link is called with these arguments, and that uses ``carried``."""
    boundary = Boundary()
    known: dict[int, int] = {}

    def slot_of(stub: Tensor) -> int:
        if id(stub) not in known:
            known[id(stub)] = len(boundary.metas)
            meta = torch.empty(stub.shape, dtype=stub.dtype, device="meta", requires_grad=stub.requires_grad)
            boundary.metas.append(meta)
        return known[id(stub)]

    for position, leaf in enumerate(tree_flatten((args, kwargs))[0]):
        if is_stub(leaf):
            boundary.slots[position] = slot_of(leaf)
    for output, value in carried.items():
        boundary.carried[output] = slot_of(value)
    return boundary


class StageRun:
    """Observes one stage's run of the user's step on one micro-batch.

    Args:
        links: The stage's own.
        names: Of all links.
        shapes: Of this kind of micro-batch.
        stage: The number of the stage.
        received: What it was sent.
        begin: Called before the first of its own links, where it was sent something.

    Attributes:
        recomputation: For the backward, where the step calls a link that got a received tensor within a checkpoint.
    """

    def __init__(
        self,
        links: range,
        names: Sequence[str],
        shapes: Shapes,
        stage: int,
        received: tuple[Tensor, ...],
        begin: Callable[[], None],
    ) -> None:
        self._links = links
        self._names = names
        self._shapes = shapes
        self._stage = stage
        self._received = received
        self._begin = begin
        before, after = (shapes.boundaries.get(number, Boundary()) for number in (stage, stage + 1))
        self._carried = {output: received[slot] for output, slot in before.carried.items()}
        self._watched = {name for name, _ in (*before.carried, *after.carried)}
        self._returned: dict[str, list[Any]] = {}
        self._fakes = active_fake_mode()
        self._in_place_of: dict[int, tuple[Any, Tensor]] = {}  # by id of a stub, which is kept alive
        self._next = 0
        self._first: int | None = None  # the link with which a stage that was sent something began
        self._replaced: dict[int, dict[int, Tensor]] = {}
        self.recomputation: Recomputation | None = None

    def called(self, index: int, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pass over links of earlier stages, run own ones on real values, and stop at the next stage's first."""
        if index < self._next:
            raise StepRefused(
                f"`{self._names[index]}` was called again, or behind a block that came after it in the step's first "
                "run: a batch passes through the stages once, so each block is called once, and in one order. What "
                "runs the model for each token, as `generate` does, needs a run without a pipeline or `memopt_zero3`."
            )
        self._next = index + 1
        if index < self._links.start:
            if index not in self._shapes.outputs:
                return call(*args, **kwargs)
            output = self._shapes.outputs[index]
            instead = self.returned(self._names[index], output)
            return output if instead is None else instead
        begins = self._stage > 0 and self._first is None  # with its first link, or the next where that is skipped
        if index in self._shapes.direct and index < self._links.stop and not begins:
            # Taking arguments apart costs more than all else that is done here.
            return call(*args, **kwargs)
        leaves, tree = tree_flatten((args, kwargs))
        if begins:
            self._begin()
            self._first = index
            for position, slot in self._shapes.boundaries[self._stage].slots.items():
                self._check_takes_the_same(index, self._links.start, leaves, position, self._received[slot])
                self._in_place_of[id(leaves[position])] = (leaves[position], self._received[slot])
        real = [self._in_place_of[id(leaf)][1] if id(leaf) in self._in_place_of else leaf for leaf in leaves]
        if index >= self._links.stop:
            raise StageDone(self._collect(real, index))
        if all(map(operator.is_, real, leaves)):
            self._shapes.direct.add(index)
        elif is_checkpointed():  # asked here alone, since it takes a walk over the stack
            pairs = enumerate(zip(leaves, real, strict=True))
            self._replaced[index] = {position: value for position, (leaf, value) in pairs if value is not leaf}
            self._recompute()
        args, kwargs = tree_unflatten(real, tree)
        return call(*args, **kwargs)

    def returned(self, name: str, output: Any) -> Any:
        """Put what was received in the place of what a module returned, and keep what is to be sent."""
        if name not in self._watched or active_fake_mode() is not self._fakes:
            return None  # or on fake tensors, to learn what it costs
        if name in self._returned:
            raise StepRefused(
                f"`{name}` was called again, and in its first run the step called it once: what it returns is sent "
                "to later stages, and a pipeline needs the same calls each time."
            )
        instead = put(self._carried, name, output)
        self._returned[name] = tree_leaves(output if instead is None else instead)
        if instead is not None and is_checkpointed():
            self._recompute()
        return instead

    def _recompute(self) -> None:
        outputs = self._shapes.outputs
        for index in [i for i in outputs if self._carried and self._names[i] in self._watched]:
            instead = put(self._carried, self._names[index], outputs[index])
            outputs = outputs if instead is None else outputs | {index: instead}
        begin = (self._first, self._begin)
        self.recomputation = Recomputation(self._links.start, outputs, self._replaced, self._carried, begin)

    def _collect(self, leaves: list[Any], index: int) -> tuple[Tensor, ...]:
        boundary = self._shapes.boundaries[self._stage + 1]
        tensors: list[Any] = [None] * len(boundary.metas)
        for position, slot in boundary.slots.items():
            self._check_takes_the_same(index, self._links.stop, leaves, position, boundary.metas[slot])
            if is_stub(leaves[position]):
                raise StepRefused(
                    f"`{self._names[index]}` gets a tensor of shape {tuple(leaves[position].shape)} that comes from "
                    "an earlier stage by another way than through the arguments of blocks, so it cannot be sent."
                )
            tensors[slot] = leaves[position].contiguous()
        for (name, number), slot in boundary.carried.items():
            value = self._returned[name][number] if name in self._returned else None
            _, value = self._in_place_of.get(id(value), (None, value))
            if value is None or is_stub(value):
                raise StepRefused(
                    f"`{name}` was not called before `{self._names[index]}` as in the step's first run, and later "
                    "stages need what it returned; a pipeline needs the same calls each time."
                )
            tensors[slot] = value.contiguous()
        return tuple(tensors)

    def _check_takes_the_same(self, index: int, start: int, leaves: list[Any], position: int, sent: Tensor) -> None:
        """Make sure that link ``index``, where ``start`` is skipped, is handed what ``start`` would be."""
        leaf = leaves[position] if position < len(leaves) else None
        if index != start and (not isinstance(leaf, Tensor) or leaf.shape != sent.shape):
            raise StepRefused(
                f"the step skips `{self._names[start]}`, which a stage begins with, and `{self._names[index]}` "
                "behind it takes other arguments; let stages begin with modules that are not skipped (`split=[...]`)."
            )

    def check_finished(self) -> None:
        """Raise :class:`StepRefused` if the step skipped all links of this last stage, or of those behind this one.

        On the last stage it may leave out what comes last, such as an auxiliary head that validation does not need.
        """
        needed = self._links.start if self._links.stop == len(self._names) else self._links.stop
        if self._next <= needed:
            raise StepRefused(
                f"the step ended before it called `{self._names[needed]}`, which a stage begins with, or a block "
                "behind that; a pipeline needs a block of each stage in each step. Where steps "
                "skip blocks at random, as `layerdrop` does, give stages more of them, or set it to 0."
            )
