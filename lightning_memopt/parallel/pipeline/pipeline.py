"""A module cut into stages, and batches run through them."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch.utils._pytree import tree_leaves

from lightning_memopt.parallel.agreement import gather_values
from lightning_memopt.parallel.gather import complete_in_place
from lightning_memopt.parallel.pipeline.boundary import (
    Shapes,
    StageDone,
    StageRun,
    read_shapes,
    shapes_of_stages,
    watched_in,
)
from lightning_memopt.parallel.pipeline.chain import Chain
from lightning_memopt.parallel.pipeline.operator_times import OperatorTimes
from lightning_memopt.parallel.pipeline.ownership import SharedBuffers, SharedParameters, free_in_place
from lightning_memopt.parallel.pipeline.probe import find_links, run_silently, survey
from lightning_memopt.parallel.pipeline.random_streams import RandomStreams
from lightning_memopt.parallel.pipeline.recompute import Recomputation
from lightning_memopt.parallel.pipeline.schedules import (
    STAGES_EACH,
    Schedule,
    make_schedule,
    rank_of_stage,
    run_forward,
)
from lightning_memopt.parallel.pipeline.splitting import Split, holders, number_of_stages, partition
from lightning_memopt.parallel.pipeline.stage import Stage, StageModule
from lightning_memopt.parallel.pipeline.stubs import (
    WAITS_FOR_ALL,
    StubMode,
    find_places,
    in_place_of,
    is_stub,
    shadow_of,
)
from lightning_memopt.parallel.refusal import StepRefused, StepWaits

Call = Callable[[nn.Module, Any], Any]
"""(module or its shadow, micro-batch): runs a step of the user's on it."""

StepOfBatch = Callable[[int, bool], Any]
"""(number of the micro-batch, whether this is the last stage): runs the step; on the last stage returns the loss."""


class Pipeline:
    """Cuts ``module`` into stages and frees what this rank does not hold.

    All ranks of the world make it together, those of one pipeline with the same module and samples.

    Args:
        module: The model, whole on every rank.
        call: Runs a step of the user's on it, or on its shadow.
        sample: A micro-batch.
        key: What else than ``sample`` its shapes depend on, as in :meth:`train`.
        group: The ranks of the pipeline.
        pipelines: The global ranks of each pipeline of the world, this one's too.
        device: Where this rank computes.
        schedule: See :mod:`~lightning_memopt.parallel.pipeline.schedules`.
        split: See :data:`~lightning_memopt.parallel.pipeline.splitting.Split`.
        prepare: Called with the shadow before anything is run on it.
        around: Makes the context of each backward, from whether it is the stage's last of the batch.

    Attributes:
        partition: How it was cut.
        unseen_share: Of the parameters, the part that is used behind where a run without values stopped, all of it on
            the last stage.
        stopped_by: The error that it stopped with.
        random: Of the runs of the step; :meth:`train` and :meth:`evaluate` are called within
            :meth:`~lightning_memopt.parallel.pipeline.random_streams.RandomStreams.apart`.

    Raises:
        ValueError: It cannot be cut so; says why.
    """

    def __init__(
        self,
        module: nn.Module,
        call: Call,
        sample: Any,
        key: Hashable = None,
        *,
        group: dist.ProcessGroup,
        pipelines: Sequence[Sequence[int]],
        device: torch.device,
        schedule: Schedule = "1f1b",
        split: Split = "auto",
        prepare: Callable[[nn.Module], None] = lambda shadow: None,
        around: Callable[[bool], AbstractContextManager[Any]] = lambda is_last: nullcontext(),
    ) -> None:
        self.module = module
        self.group = group
        self.device = device
        self.schedule: Schedule = schedule
        self.random = RandomStreams(group)
        self._around = around
        self._mode = StubMode()
        self._ranks = dist.get_world_size(group)
        self._rank = dist.get_rank(group)
        count = number_of_stages(split, self._ranks, STAGES_EACH[schedule])
        self._stubs: dict[Tensor, Tensor] = {
            tensor: self._mode.stub(tensor, device) for tensor in (*module.parameters(), *module.buffers())
        }
        self._make_shadow(prepare)

        def run() -> Any:
            return call(self._shadow, sample)

        links = find_links(self._shadow, run_silently(self._shadow, run))
        # Where a run is predicted nothing can be timed.
        times = OperatorTimes(device) if split == "measured" and active_fake_mode() is None else None
        waits = _waits_of_all()
        found = survey(self._shadow, links, self._mode, run_silently(self._shadow, run), times)
        if _waits_of_all() != waits:
            raise StepWaits(WAITS_FOR_ALL)
        if times is not None:  # by one rank for all, which must cut alike
            found.costs = gather_values(tuple(times.costs(len(found.costs))) if dist.get_rank() == 0 else None)[0]
        self.partition = partition(found, split, count)
        held = holders(module, found, self.partition, self._stubs)
        unseen = [p for p in module.parameters() if not found.is_whole and self._stubs[p] not in found.uses]
        self.unseen_share = sum(p.numel() for p in unseen) / max(1, sum(p.numel() for p in module.parameters()))
        self.stopped_by = found.stopped_by
        self._stages = [stage for stage in range(count) if rank_of_stage(schedule, stage, self._ranks) == self._rank]
        self._share(held, pipelines)
        on_every_rank = [name for name, buffer in module.named_buffers() if buffer not in held]
        self._free(held)
        self._buffers = SharedBuffers(on_every_rank, module, group)
        called = set[int]().union(*(found.called.get(start, ()) for start in self.partition.starts))
        shapes = shapes_of_stages(found.boundaries, found.outputs, self.partition.starts, called)
        watched = {name: module.get_submodule(name) for name in watched_in(shapes)}
        self._chain = Chain((module.get_submodule(name) for name in links), watched)
        parts = {module.get_submodule(name): name for name in links}
        self._chain.absent = {part: name for part, name in parts.items() if any(p.is_meta for p in part.parameters())}
        self._followed: tuple[tuple[bool, ...], tuple[bool, ...]] = ((), ())
        self._shapes: dict[Hashable, Shapes] = {_kind_of_run(key, self._follow_modes(), sample): shapes}
        self._schedules: dict[Hashable, tuple[list[Stage], Any]] = {}
        self._step: StepOfBatch | None = None
        self._of_batch: list[Shapes] = []
        self._recomputations: dict[tuple[int, int], Recomputation] = {}  # by stage and micro-batch

    @property
    def last_rank(self) -> int:
        """The global rank that runs the last stage."""
        return dist.get_global_rank(self.group, rank_of_stage(self.schedule, len(self.partition) - 1, self._ranks))

    @property
    def is_running(self) -> bool:
        """Whether a stage is being run."""
        return self._chain.observer is not None

    def counts(self, parameter: nn.Parameter) -> bool:
        """Whether this rank counts ``parameter``, of those that hold it."""
        return self._shared.counts(parameter)

    def sum_shared_gradients(self) -> None:
        """Add up the gradients of tied weights over the stages; once, before the optimizer steps."""
        self._shared.sum_gradients()

    def share_buffers(self) -> None:
        """Give all ranks the buffers that only some stages write; all ranks must call it together."""
        self._buffers.share()

    def train(self, call: Call, key: Hashable, micro_batches: Sequence[Any], step: StepOfBatch) -> None:
        """Forward and backward of a batch.

        Args:
            call: Runs the step that ``step`` runs, on the shadow.
            key: What else than the micro-batch its shapes depend on.
            micro_batches: In order; their shapes may differ.
            step: Runs one of them.
        """
        stages, schedule = self._prepare(call, key, micro_batches, step, trains=True)
        indices = torch.arange(len(micro_batches))
        self._run(lambda: schedule.step(index=indices, target=indices, return_outputs=False))
        for stage in stages:
            stage.clear_runtime_states()

    def evaluate(self, call: Call, key: Hashable, micro_batches: Sequence[Any], step: StepOfBatch) -> None:
        """Forward of a batch; see :meth:`train`."""
        stages, _ = self._prepare(call, key, micro_batches, step, trains=False)
        indices = torch.arange(len(micro_batches)).split(1)
        with torch.no_grad():
            self._run(lambda: run_forward(self.schedule, stages, self._ranks, indices))

    def undo(self, gather: bool) -> None:
        """Put the module back; with ``gather`` with all values, for which all ranks must call it together."""
        self._chain.remove()
        if gather:
            self.share_buffers()
            complete_in_place(self.module)

    def _make_shadow(self, prepare: Callable[[nn.Module], None]) -> None:
        stands_for: dict[Tensor, Tensor] = {}
        for owner in self.module.modules():
            holds = next(owner.parameters(recurse=False), None) is not None
            for tensor in (*owner.parameters(recurse=False), *(owner.buffers(recurse=False) if holds else ())):
                stands_for[tensor] = self._stubs[tensor]
        for buffer in self.module.buffers():
            if buffer not in stands_for:
                stands_for[buffer] = buffer.detach().to(self.device, copy=True)
        self._shadow, self._copies = shadow_of(self.module, stands_for)
        prepare(self._shadow)

    def _share(self, held: dict[Tensor, set[int]], pipelines: Sequence[Sequence[int]]) -> None:
        shared = {}
        for name, parameter in self.module.named_parameters():
            ranks = {rank_of_stage(self.schedule, stage, self._ranks) for stage in held[parameter]}
            if len(ranks) > 1:
                shared[name] = tuple(sorted(ranks))
        self._shared = SharedParameters(shared, self.module, self.group, pipelines)

    def _free(self, held: dict[Tensor, set[int]]) -> None:
        mine = set(self._stages)
        others = {tensor for tensor, stages in held.items() if not stages & mine}
        names = [name for name, parameter in self.module.named_parameters() if parameter not in others]
        of_stage = {
            stage: [name for name in names if stage in held[self.module.get_parameter(name)]]
            for stage in self._stages
        }
        self._parameters_of_stage = of_stage
        freed = free_in_place(self.module, others)
        self._flags: list[tuple[Tensor, Tensor]] = [
            (p, self._stubs[p]) for p in self.module.parameters() if p in self._stubs
        ]
        self._flags += [(meta, self._stubs[p]) for p, meta in freed.items() if isinstance(p, nn.Parameter)]
        stubs = {meta: self._stubs[tensor] for tensor, meta in freed.items()}
        self._freed = [(owner, name, stubs[meta]) for owner, name, meta in find_places(self.module, stubs)]
        # Of this rank's other stages: a stage that runs their modules too, on its way, would write what they write.
        others_of = {stage: {t for t, of in held.items() if of & mine and stage not in of} for stage in self._stages}
        self._of_other_stages = {
            stage: [
                (owner, name, self._stubs[buffer])
                for owner, name, buffer in find_places(self.module, of_others)
                if not isinstance(buffer, nn.Parameter)
            ]
            for stage, of_others in others_of.items()
        }
        self._stubs = {}

    def _prepare(
        self, call: Call, key: Hashable, micro_batches: Sequence[Any], step: StepOfBatch, trains: bool
    ) -> tuple[list[Stage], Any]:
        self._step = step
        modes = self._follow_modes()
        self._of_batch = [self._shapes_of(call, _kind_of_run(key, modes, micro), micro) for micro in micro_batches]
        counts = tuple(len(boundary.metas) for boundary in self._of_batch[0].boundaries.values())
        kind = (trains, len(micro_batches), counts)
        if kind not in self._schedules:
            stages = [self._make_stage(stage) for stage in self._stages]
            made = make_schedule(self.schedule, stages, len(micro_batches)) if trains else None
            self._schedules[kind] = (stages, made)
        stages, schedule = self._schedules[kind]
        for stage in stages:
            stage.inputs = [self._metas(shapes, stage.stage_index) for shapes in self._of_batch]
            stage.outputs = [self._metas(shapes, stage.stage_index + 1) for shapes in self._of_batch]
        return stages, schedule

    def _make_stage(self, stage: int) -> Stage:
        parameters = [self.module.get_parameter(name) for name in self._parameters_of_stage[stage]]
        made = Stage(
            StageModule(stage, self._forward, parameters),
            stage,
            len(self.partition),
            self.device,
            self.group,
            self._backward,
            [self._metas(self._of_batch[0], stage)],
            [self._metas(self._of_batch[0], stage + 1)],
            splits_backward=self.schedule == "zbv",
        )
        # torch's schedules set it, and evaluation runs without one.
        made.stage_index_to_group_rank = {
            index: rank_of_stage(self.schedule, index, self._ranks) for index in range(len(self.partition))
        }
        return made

    def _metas(self, shapes: Shapes, stage: int) -> list[Tensor]:
        """Stubs like what ``stage`` receives; behind the last one is the loss."""
        if stage == len(self.partition):
            return [torch.empty((), device="meta")]
        return shapes.boundaries[stage].metas if stage else []

    def _follow_modes(self) -> Hashable:
        """Let the shadow be in training mode, and frozen, where the module is."""
        training = tuple([original.training for original in self._copies])
        flags = tuple([parameter.requires_grad for parameter, _ in self._flags])
        if (training, flags) != self._followed:  # in nearly every batch they are as before
            for twin, mode in zip(self._copies.values(), training, strict=True):
                twin.training = mode
            for (_, stub), flag in zip(self._flags, flags, strict=True):
                if stub.requires_grad != flag:
                    stub.requires_grad_(flag)
            self._followed = (training, flags)
        return self._followed

    def _shapes_of(self, call: Call, kind: Hashable, micro_batch: Any) -> Shapes:
        if kind not in self._shapes:
            run = run_silently(self._shadow, lambda: call(self._shadow, micro_batch))
            known = next(iter(self._shapes.values()))
            self._shapes[kind] = read_shapes(self._shadow, self.partition.names, self.partition.starts, known, run)
        return self._shapes[kind]

    def _run(self, function: Callable[[], Any]) -> None:
        try:
            with in_place_of(self._freed):
                function()
        except RuntimeError as error:
            if error.__cause__ is not None and str(error.__cause__):
                raise error.__cause__ from None  # torch wraps what the step raised in its own words
            raise
        finally:
            self._step, self._of_batch = None, []
            self._recomputations.clear()

    def _forward(self, stage: int, index: int, received: tuple[Tensor, ...]) -> Any:
        assert self._step is not None
        links = self.partition.links_of(stage)
        is_last = stage == len(self.partition) - 1
        run = StageRun(
            links,
            self.partition.names,
            self._of_batch[index],
            stage,
            received,
            partial(self.random.begin_own, stage, index),
        )
        self.random.begin(index)
        self._chain.observer = run
        try:
            with in_place_of(self._of_other_stages[stage]):
                output = self._step(index, is_last)
        except StageDone as done:
            return done.tensors
        finally:
            self._chain.observer = None
            if run.recomputation is not None:
                self._recomputations[stage, index] = run.recomputation
        run.check_finished()
        if is_stub(output):
            raise StepRefused(
                "the loss is computed from a value of an earlier stage that did not come through the blocks' "
                "arguments, so it cannot be sent to the last stage."
            )
        return output

    @contextmanager
    def _backward(self, stage: int, index: int, is_last: bool) -> Iterator[None]:
        self._chain.observer = self._recomputations.get((stage, index))
        try:
            with in_place_of(self._of_other_stages[stage]), self._around(is_last):
                yield
        finally:
            self._chain.observer = None


def _waits_of_all() -> int:
    """How many collectives of all ranks there have been; gloo and NCCL count them."""
    world: Any = dist.group.WORLD
    with suppress(RuntimeError):  # of other backends, and of the one that predicts
        return int(world._get_sequence_number_for_group())
    return 0


def _kind_of_run(key: Hashable, modes: Hashable, micro_batch: Any) -> Hashable:
    return key, modes, tuple(_kind(leaf) for leaf in tree_leaves(micro_batch))


def _kind(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype
    return leaf if isinstance(leaf, int | float | str | bool | type(None)) else str(type(leaf))
