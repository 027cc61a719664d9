"""Trace the step of a module as a choice has it, once for each choice."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_memopt.memory.report import MemoryReport, TimelinePoint
from lightning_memopt.memory.workspace import Need
from lightning_memopt.models.fake import is_fake
from lightning_memopt.parallel.pipeline.splitting import Partition
from lightning_memopt.planning.build import SMALL_BYTES
from lightning_memopt.planning.depth import (
    SHALLOW,
    Stack,
    cut,
    extrapolate_points,
    extrapolate_times,
    find_deep_stack,
    with_blocks,
)
from lightning_memopt.planning.devices import DeviceModel
from lightning_memopt.planning.operators import Collective, OperatorCall, OperatorLog
from lightning_memopt.planning.predict import Module, measure_step, predict_step
from lightning_memopt.planning.ranks import one_of_many
from lightning_memopt.planning.search import Refused
from lightning_memopt.planning.space import Choice, Layout, Techniques
from lightning_memopt.planning.stages import (
    Stages,
    block_names_to_cut_before,
    count_micro_batches,
    few_micro_batches,
    is_deep,
    stages_to_trace,
    whole_partition,
)
from lightning_memopt.planning.values import ReadsValues
from lightning_memopt.techniques.batches import batch_size, copied, micro_batches, tensors_in
from lightning_memopt.techniques.lazy_logits import LogitsNotFormedError

_WHOLE_TIMELINE = 10**7
_QUICK_BLOCKS = 16


@dataclass(frozen=True)
class StepTrace:
    """One predicted optimizer step of one rank.

    Attributes:
        points: Memory in use: after each change, or the largest of each place of a step.
        operators: What ran.
        collectives: What ranks sent each other.
        notes: What the figures leave out.
        stages: Of a pipeline, of which the rest is that of the stage that holds the most.
        micro_batches: In how many parts the batch was taken, outside of pipelines.
    """

    points: tuple[TimelinePoint, ...]
    operators: tuple[OperatorCall, ...]
    collectives: tuple[Collective, ...]
    notes: tuple[str, ...] = ()
    stages: Stages | None = None
    micro_batches: float = 1.0

    @property
    def peak(self) -> TimelinePoint:
        """The largest point."""
        return max(self.points, key=lambda point: point.total_bytes)

    def is_same(self, other: "StepTrace") -> bool:
        """Whether both do the same, with the same peak."""
        return (
            self.peak.by_category == other.peak.by_category
            and set(self.operators) == set(other.operators)
            and set(self.collectives) == set(other.collectives)
        )


class StepTracer:
    """Traces of one module and batch, kept.

    Args:
        module: A LightningModule, or a function that makes one.
        look: The module to look at; the same where it is no function.
        batch: One batch of one device.
        trainer_options: Arguments of ``pl.Trainer`` that every plan shares.
        device: What it will run on; ``None`` is a CPU like this.
        with_values: What is measured where a step reads values, which ``module`` may have none of; by default
            ``module``.
    """

    def __init__(
        self,
        module: Module,
        look: pl.LightningModule,
        batch: Any,
        trainer_options: Mapping[str, Any],
        device: DeviceModel | None = None,
        with_values: Module | None = None,
    ) -> None:
        self._gpu_granularity = device.granularity if device is not None and device.kind == "cuda" else None
        self._module = module
        self._with_values = module if with_values is None else with_values
        self._batch = batch
        self._options = dict(trainer_options)
        self._stack = find_deep_stack(look)
        # Parameters, gradients and two moments of Adam's.
        is_small = 4 * sum(parameter.nbytes for parameter in look.parameters()) <= SMALL_BYTES
        real = self._with_values
        has_values = not (isinstance(real, pl.LightningModule) and any(map(_is_empty, real.parameters())))
        self._can_be_measured = is_small and has_values
        self._real_because: ReadsValues | None = None
        self._kernels: dict[str, Need] = {}
        self._prepares: bool | None = None
        self._partition: Partition | None = None  # of the pipeline that was traced last
        self._known: dict[Choice, StepTrace | str] = {}

    def trace(self, choice: Choice) -> StepTrace:
        """The step as ``choice`` has it.

        Raises:
            Refused: Something in it does not take the module.
            ValueError: The step cannot be predicted at all.
        """
        if choice not in self._known:
            try:
                self._known[choice] = self._of_stages(choice) or self._of_few_blocks(choice) or self._run(choice)
            except MisconfigurationException as refusal:
                self._known[choice] = str(refusal)
            except LogitsNotFormedError as refusal:
                self._known[choice] = f"ChunkedLoss: {refusal}"
        known = self._known[choice]
        if isinstance(known, str):
            raise Refused(known)
        return known

    @property
    def is_quick(self) -> bool:
        """Whether a trace of all blocks, which a budget of activations takes, is quick."""
        return self._stack is None or len(self._stack) <= _QUICK_BLOCKS

    def _of_stages(self, choice: Choice) -> StepTrace | None:
        if choice.layout.sizes.pipeline == 1:
            return None
        traces, partition = self._stages_of_few_blocks(choice) or self._whole_stages(choice)
        largest = max(traces.values(), key=lambda trace: trace.peak.total_bytes)
        microbatches = count_micro_batches(batch_size(self._batch), choice.layout.sizes.pipeline)
        return replace(largest, stages=Stages(traces, partition.costs, microbatches))

    def _whole_stages(self, choice: Choice) -> tuple[dict[int, StepTrace], Partition]:
        first = self._run(choice)
        assert self._partition is not None
        partition = self._partition
        return {0: first} | {
            each: self._run(choice, stage=each) for each in stages_to_trace(partition)[1:]
        }, partition

    def _stages_of_few_blocks(self, choice: Choice) -> tuple[dict[int, StepTrace], Partition] | None:
        """Each stage from two traces of a model in which it has few blocks, and every other stage one."""
        stack, stages = self._stack, choice.layout.sizes.pipeline
        if stack is None or not is_deep(stack, stages):
            return None

        def run(stage: int, blocks: int) -> tuple[StepTrace, Partition]:
            traced = self._run(choice, (stack, stages - 1 + blocks), stage)
            assert self._partition is not None
            return traced, self._partition

        def both(stage: int) -> list[tuple[StepTrace, Partition]]:
            return [run(stage, blocks) for blocks in (SHALLOW, SHALLOW + 1)]

        try:
            (shallow, few), (deep, one_more) = both(0)
            partition = whole_partition(few, one_more, stack)
            if partition is None:
                return None
            pairs = {0: (shallow, deep)}
            for stage in stages_to_trace(partition)[1:]:
                (shallow, _), (deep, _) = both(stage)
                pairs[stage] = (shallow, deep)
        except (LogitsNotFormedError, ReadsValues):
            raise
        except Exception:  # a cut that the balanced one does not have, or code that counts on all blocks
            return None
        found = {
            stage: _extrapolated(*pair, stack.of_stage(stage, SHALLOW + 1), len(partition.links_of(stage)))
            for stage, pair in pairs.items()
        }
        known = {stage: trace for stage, trace in found.items() if trace is not None}
        return (known, partition) if len(known) == len(found) else None

    def _of_few_blocks(self, choice: Choice) -> StepTrace | None:
        stack = self._stack
        # A budget is dealt out among all blocks: two of three are not as two of many.
        if stack is None or choice.techniques.checkpointing == "budget":
            return None
        try:
            shallow, deep = (self._run(choice, (stack, count)) for count in (SHALLOW, SHALLOW + 1))
        except (MisconfigurationException, LogitsNotFormedError, ReadsValues):
            raise
        except Exception:  # code of the user's that counts on all of its blocks
            self._stack = None
            return None
        return _extrapolated(shallow, deep, stack, len(stack))

    def _run(self, choice: Choice, blocks: tuple[Stack, int] | None = None, stage: int = 0) -> StepTrace:
        """Trace one step: the second of two, or one alone where the module and the layout make both the same."""
        techniques, layout = choice.techniques, choice.layout
        # Elsewhere the optimizers are not the trainer's, or the first step does what no other does: it makes the
        # buckets of replicas, tries whether layers can be split, and looks at what a budget is dealt out among.
        is_usual = not (techniques.in_backward or techniques.low_bit or techniques.checkpointing == "budget") and (
            layout.strategy in ("auto", "memopt_pp") or (layout.sizes.shard > 1 and layout.sizes.tensor == 1)
        )
        return self._step(choice, blocks, prepares=is_usual and self._is_alike(choice, blocks), stage=stage)

    def _is_alike(self, choice: Choice, blocks: tuple[Stack, int] | None) -> bool:
        """Whether the module's first step is its second, once the optimizers have their state; looked at once."""
        if self._prepares is None:
            plain = Choice(Layout(), Techniques(precision=choice.techniques.precision))
            try:
                second, first = (self._step(plain, blocks, prepares=prepares) for prepares in (False, True))
            except Exception:  # of a module that needs more, or an optimizer that wants more than gradients
                self._prepares = False
            else:
                self._prepares = self._real_because is None and first.is_same(second)
        return self._prepares

    def _step(self, choice: Choice, blocks: tuple[Stack, int] | None, prepares: bool, stage: int = 0) -> StepTrace:
        batch, repeats, left_out_bytes, of_stage = self._batch, 1.0, 0, dict[str, Any]()
        size, pipeline = choice.techniques.micro_batch, choice.layout.sizes.pipeline
        if pipeline > 1:
            batch, few = few_micro_batches(batch, pipeline, stage)
            of_stage = {"stage": stage, "microbatches": few}
            if blocks is not None:
                stack, count = blocks
                of_stage["split"] = block_names_to_cut_before(stack, count - pipeline + 1, pipeline, stage)
        elif size is not None:
            # The third micro-batch and those after it repeat the second: gradients are there, activations come again.
            batch = micro_batches(batch, 2 * size)[0]
        if batch is not self._batch:
            repeats = batch_size(self._batch) / batch_size(batch)
            left_out_bytes = _size_bytes(self._batch) - _size_bytes(batch)
            batch = copied(batch)  # a view would be traced with all of it
        log = OperatorLog()
        with _cut(self._module, blocks) as module:
            report = self._report(module, blocks, batch, choice, log, prepares, of_stage)
        points = report.timeline
        if left_out_bytes:
            points = tuple(_with_more(point, "other", left_out_bytes) for point in points)
        operators = [
            call if call.part == "optimizer" else call._replace(times=call.times * repeats) for call in log.calls
        ]
        # Gradients are reduced once a step; what is gathered or sent is so for each micro-batch.
        collectives = [
            each if each.kind == "reduce_scatter" else each._replace(times=each.times * repeats)
            for each in log.collectives
        ]
        parts = 1.0 if size is None else batch_size(self._batch) / size
        return StepTrace(points, tuple(operators), tuple(collectives), report.notes, micro_batches=parts)

    def _report(
        self,
        module: Module,
        blocks: tuple[Stack, int] | None,
        batch: Any,
        choice: Choice,
        log: OperatorLog,
        prepares: bool,
        of_stage: Mapping[str, Any],
    ) -> MemoryReport:
        options: dict[str, Any] = {
            "callbacks": choice.techniques.callbacks("cpu"),
            "log": log,
            "timeline_points": _WHOLE_TIMELINE,
            "precision": choice.techniques.precision,
            **self._options,
        }
        is_alone = choice.layout.sizes.world == 1
        if self._real_because is None:
            try:
                with nullcontext() if is_alone else one_of_many(choice.layout, **of_stage) as strategy:
                    report = predict_step(
                        module,
                        batch,
                        known_kernels=self._kernels,
                        gpu_granularity=self._gpu_granularity,
                        rank_strategy=strategy,
                        prepares=prepares,
                        **options,
                    )
                    self._partition = cast(Any, strategy).pipeline.partition if of_stage else None
                return report
            except ReadsValues as refusal:
                if not (is_alone and self._can_be_measured):
                    raise
                self._real_because = refusal
        with _cut(self._with_values, blocks) as real:
            report = measure_step(real, batch, **options)
        reason = str(self._real_because).partition(";")[0]
        return replace(report, notes=(*report.notes, f"{reason}; so one device was measured with real tensors"))


def _extrapolated(shallow: StepTrace, deep: StepTrace, traced: Stack, blocks: int) -> StepTrace | None:
    points = extrapolate_points(shallow.points, deep.points, traced, blocks)
    if points is None:
        return None
    return StepTrace(
        points,
        tuple(extrapolate_times(shallow.operators, deep.operators, blocks)),
        tuple(extrapolate_times(shallow.collectives, deep.collectives, blocks)),
        deep.notes,
        micro_batches=deep.micro_batches,
    )


@contextmanager
def _cut(module: Module, blocks: tuple[Stack, int] | None) -> Iterator[Module]:
    """``module`` with as many blocks; one that the user made is put right again."""
    if blocks is None:
        yield module
    elif isinstance(module, pl.LightningModule):
        with with_blocks(module, *blocks):
            yield module
    else:
        yield lambda: _cut_for_good(module(), *blocks)


def _cut_for_good(module: Any, stack: Stack, count: int) -> Any:
    cut(module, stack, count)
    return module


def _is_empty(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or is_fake(tensor)


def _with_more(point: TimelinePoint, category: str, size_bytes: int) -> TimelinePoint:
    return replace(point, by_category={**point.by_category, category: point.by_category[category] + size_bytes})


def _size_bytes(batch: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors_in(batch))
