"""A pipeline in a plan: which stages and how many micro-batches are traced, and what these say of the others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_memopt.parallel.pipeline.probe import Survey
from lightning_memopt.parallel.pipeline.schedules import Schedule, number_of_micro_batches
from lightning_memopt.parallel.pipeline.splitting import Partition, partition
from lightning_memopt.planning.depth import SHALLOW, Stack
from lightning_memopt.techniques.batches import batch_size, micro_batches

if TYPE_CHECKING:
    from lightning_memopt.planning.trace import StepTrace

SCHEDULE: Schedule = "1f1b"
"""The strategies' own default, in which a stage holds as many micro-batches as stages follow it, and its own."""


@dataclass(frozen=True)
class Stages:
    """What is known of the stages of a pipeline.

    Attributes:
        traces: Of those that may hold the most, by their number.
        costs: Of each, in multiply-adds of the forward.
        microbatches: In a batch.
    """

    traces: Mapping[int, "StepTrace"]
    costs: tuple[float, ...]
    microbatches: int

    def by_stage(self, traced: Mapping[int, float]) -> list[float]:
        """A quantity that grows with the cost, known of the stages that were traced, of all."""
        a_unit = sum(traced.values()) / sum(self.costs[stage] for stage in traced)
        return [traced.get(stage, cost * a_unit) for stage, cost in enumerate(self.costs)]


def count_micro_batches(samples: int, stages: int) -> int:
    """How many micro-batches the strategy makes of a batch."""
    return number_of_micro_batches("auto", SCHEDULE, stages, samples)


def few_micro_batches(batch: Any, stages: int, stage: int) -> tuple[Any, int]:
    """A part of ``batch``, and how many micro-batches it makes, of the size that the whole is split into.

    Before its first backward the first stage holds as many as there are stages, and each that follows one less. With
    one more, a stage also runs a backward beside as many and the gradients; all that follow repeat it.
    """
    samples = batch_size(batch)
    count = count_micro_batches(samples, stages)
    few = min(count, stages + (stage == 0))  # no fewer than stages: the schedule fills all of them
    return micro_batches(batch, few * -(-samples // count))[0], few


def is_deep(stack: Stack, stages: int) -> bool:
    """Whether two traces of few blocks in a stage are less than one of all that it has."""
    return len(stack) // stages > 2 * SHALLOW + 1


def block_names_to_cut_before(stack: Stack, blocks: int, stages: int, stage: int) -> list[str]:
    """Cuts by which ``stage`` has so many blocks, and every other stage one."""
    return [stack.names[each if each <= stage else each + blocks - 1] for each in range(1, stages)]


def whole_partition(shallow: Partition, deep: Partition, stack: Stack) -> Partition | None:
    """How the strategy cuts all blocks, from how two models of few of them cost.

    Args:
        shallow: Of a model whose first stage has :data:`~lightning_memopt.planning.depth.SHALLOW` blocks, the others
            one.
        deep: With one more.
        stack: All blocks.

    Returns:
        The balanced cut; ``None`` where there is more to cut before than the blocks.
    """
    if deep.names != stack.names[: len(deep.names)]:
        return None
    block = deep.costs[0] - shallow.costs[0]
    before, after = shallow.costs[0] - SHALLOW * block, shallow.costs[-1] - block
    costs = [before, *[block] * (len(stack) - 1), block + after]
    return partition(Survey(list(stack.names), costs), "auto", len(shallow))


def stages_to_trace(partition: Partition) -> list[int]:
    """The stages of which one holds the most: the first and the last, and of those between the ones with most blocks.

    A stage holds the state of its blocks, and activations of its blocks times the micro-batches in flight there. The
    first also has what comes before the blocks, the last the head and what the loss needs.
    """
    lengths = [len(partition.links_of(stage)) for stage in range(len(partition))]
    in_flight = [length * (len(lengths) - stage) for stage, length in enumerate(lengths)]
    return sorted({0, lengths.index(max(lengths)), in_flight.index(max(in_flight)), len(lengths) - 1})
