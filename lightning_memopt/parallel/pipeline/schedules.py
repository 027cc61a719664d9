"""The schedules, all of them ``torch.distributed.pipelining``'s own, and what each needs."""

from collections.abc import Sequence
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import _batch_p2p, _wait_batch_p2p

from lightning_memopt.parallel.pipeline.stage import Stage

Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "zbv"]

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
}

STAGES_EACH = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": 2, "zbv": 2}
"""Stages on a rank."""


def rank_of_stage(schedule: Schedule, stage: int, ranks: int) -> int:
    """The rank within the pipeline that runs ``stage``: in turn, or there and back for ``"zbv"``."""
    round_, rank = divmod(stage, ranks)
    return ranks - 1 - rank if schedule == "zbv" and round_ % 2 else rank


def number_of_micro_batches(
    asked: int | Literal["auto"], schedule: Schedule, ranks: int, samples: int, is_first: bool = False
) -> int:
    """How many micro-batches a batch of ``samples`` is split into.

    ``"auto"`` takes four for each rank, with which a rank idles for less than a fifth of the time, or as many as
    there are samples. A smaller batch than asked for (the last of an epoch) has fewer.

    Args:
        asked: The number, or ``"auto"``.
        schedule: Interleaved schedules go in rounds of one micro-batch for each rank.
        ranks: Ranks of the pipeline.
        samples: In the batch.
        is_first: Whether it is the batch by which a number that is too large is refused.

    Raises:
        ValueError: More micro-batches than samples, in the first batch.
    """
    if is_first and asked != "auto" and asked > samples:
        raise ValueError(
            f"microbatches={asked} is more than the {samples} samples of a batch; give at most {samples}, or larger "
            "batches."
        )
    if is_first and asked == "auto" and samples < ranks:
        raise ValueError(
            f"the batches have {samples} samples, and a pipeline of {ranks} ranks is never full with fewer than "
            f"{ranks} micro-batches; give larger batches, or microbatches=1 if you want it so."
        )
    count = min(4 * ranks if asked == "auto" else asked, samples)
    if schedule == "interleaved_1f1b" and count > ranks:
        count -= count % ranks
    return count


def make_schedule(schedule: Schedule, stages: Sequence[Stage], count: int) -> Any:
    """torch's schedule for ``count`` micro-batches; 1F1B is GPipe where there are fewer of them than stages."""
    if schedule == "1f1b" and count < stages[0].num_stages:
        schedule = "gpipe"
    cls = SCHEDULES[schedule]
    of_stages = stages[0] if STAGES_EACH[schedule] == 1 else list(stages)
    # Each loss is weighted already: scaling here would divide what was accumulated before, too.
    return cls(of_stages, count, loss_fn=_is_loss, scale_grads=False)


def _is_loss(output: Tensor, _: Tensor) -> Tensor:
    return output


def forward_steps(schedule: Schedule, ranks: int, count: int) -> list[dict[int, tuple[int, int]]]:
    """When the forwards of a batch run: of each step in time, by rank, the stage and the micro-batch.

    Each rank runs its stages one after another, each on all micro-batches, as early as what it receives allows.

    Args:
        schedule: Says which stages a rank has.
        ranks: Ranks of the pipeline.
        count: Micro-batches.

    Example:
        >>> forward_steps("1f1b", ranks=2, count=2)
        [{0: (0, 0)}, {0: (0, 1), 1: (1, 0)}, {1: (1, 1)}]
    """
    steps: list[dict[int, tuple[int, int]]] = []
    made: dict[tuple[int, int], int] = {}  # by stage and micro-batch: the first step in which the next may run
    free = [0] * ranks
    for stage in range(ranks * STAGES_EACH[schedule]):  # a stage waits for earlier ones alone, on its rank or another
        rank = rank_of_stage(schedule, stage, ranks)
        for number in range(count):
            when = max(free[rank], made.get((stage - 1, number), 0))
            free[rank] = made[stage, number] = when + 1
            steps += [{} for _ in range(when + 1 - len(steps))]
            steps[when][rank] = stage, number
    return steps


def run_forward(schedule: Schedule, stages: Sequence[Stage], ranks: int, indices: Sequence[Tensor]) -> None:
    """Forward only, for any number of stages on a rank, which torch's own schedule for it is not.

    What is made in a step of :func:`forward_steps` is sent and received at its end, all of it together. NCCL runs
    what passes between two ranks in the order in which each asked for it: a rank that sends before it receives,
    facing one that does too, waits for ever.

    Args:
        schedule: Says which rank has which stages.
        stages: This rank's.
        ranks: Ranks of the pipeline.
        indices: The numbers of the micro-batches, each as a tensor.
    """
    on_rank = {stage.stage_index: stage for stage in stages}
    rank = rank_of_stage(schedule, stages[0].stage_index, ranks)
    for stage in stages:
        stage.has_backward = False
        stage.clear_runtime_states()
        stage.prepare_forward_only()
    received: dict[tuple[int, int], list[dist.Work]] = {}
    sent: list[list[dist.Work]] = []
    for step in forward_steps(schedule, ranks, len(indices)):
        operations: list[dist.P2POp] = []
        if rank in step:
            index, number = step[rank]
            _finish(received.pop((index, number), []))
            stage = on_rank[index]
            output = stage.forward_one_chunk(number, (), {"index": indices[number]}, save_forward_output=False)
            if index + 1 in on_rank:
                on_rank[index + 1].set_local_fwd_input(output, number)
            else:
                operations += stage.get_fwd_send_ops(number)
        arrives = [(i + 1, n) for other, (i, n) in step.items() if other != rank and i + 1 in on_rank]
        for index, number in arrives:
            operations += on_rank[index].get_fwd_recv_ops(number)
        works = _batch_p2p(operations)
        received.update(dict.fromkeys(arrives, works))
        sent.append(works)
    for works in sent:
        _finish(works)
    for stage in stages:
        stage.clear_runtime_states()


def _finish(works: list[dist.Work]) -> None:
    _wait_batch_p2p(works)
    works.clear()  # gloo's would wait for another one the second time
