"""How long a pipeline takes, and how long its ranks wait: the schedule itself, played with given durations."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from torch import nn

from lightning_memopt.parallel.pipeline.schedules import STAGES_EACH, Schedule, make_schedule, rank_of_stage

_FORWARD, _BACKWARD, _FOR_INPUT, _FOR_WEIGHT = "F", "B", "I", "W"  # torch's names of actions


@dataclass(frozen=True)
class PipelineTime:
    """One batch through a pipeline.

    Attributes:
        seconds: From the first forward to the last backward.
        busy: Seconds that each rank computes.
    """

    seconds: float
    busy: tuple[float, ...]

    @property
    def idle_share(self) -> float:
        """The part of all ranks' time that they wait."""
        return 1 - sum(self.busy) / (len(self.busy) * self.seconds) if self.seconds else 0.0


def pipeline_time(
    schedule: Schedule,
    ranks: int,
    microbatches: int,
    forward: Sequence[float] | None = None,
    backward: Sequence[float] | None = None,
    send: float = 0.0,
) -> PipelineTime:
    """Play torch's own table of actions of ``schedule``.

    An action begins when its rank is free and what it needs is there: the activations of the stage before, the
    gradients of the stage after, sent from another rank or not.

    Args:
        schedule: Which.
        ranks: Ranks of the pipeline.
        microbatches: Micro-batches of a batch.
        forward: Seconds of the forward of a micro-batch, by stage; equal by default, one second for a rank's stages.
        backward: Seconds of its backward, by stage; twice the forward by default. Of a backward in two parts, that
            for the input and that for the weights take a half each.
        send: Seconds until the next rank has what a stage made.

    Raises:
        ValueError: Durations for another number of stages, or a schedule that never ends.

    Example:
        >>> round(pipeline_time("1f1b", ranks=4, microbatches=8).idle_share, 3)  # (4 - 1) / (8 + 4 - 1)
        0.273
    """
    each = STAGES_EACH[schedule]
    stages = ranks * each
    forward = [1 / each] * stages if forward is None else list(forward)
    backward = [2 * seconds for seconds in forward] if backward is None else list(backward)
    if len(forward) != stages or len(backward) != stages:
        raise ValueError(
            f"durations of {len(forward)} forwards and {len(backward)} backwards were given for {ranks} ranks of "
            f"{schedule!r}, which have {stages} stages; give one for each stage"
        )
    if ranks == 1:
        busy = microbatches * (sum(forward) + sum(backward))
        return PipelineTime(busy, (busy,))
    played = _Played(forward, backward, send, [rank_of_stage(schedule, stage, ranks) for stage in range(stages)])
    return played.run(_actions(schedule, ranks, microbatches))


def pipeline_idle(schedule: Schedule, ranks: int, microbatches: int) -> float:
    """The part of the time that ranks with equal stages wait, whose backward takes twice their forward."""
    return pipeline_time(schedule, ranks, microbatches).idle_share


_Action = tuple[str, int, int]
"""Kind, stage and micro-batch."""


def _actions(schedule: Schedule, ranks: int, microbatches: int) -> list[list[_Action]]:
    """What each rank does, in order, from torch's schedule made for stages that are not there.

    Micro-batches are counted here: each stage takes them in order, but the table of torch 2.13 for 1F1B, which is
    for show, calls those of the last stage's forwards by the number of the next.
    """
    each = STAGES_EACH[schedule]
    stages = [
        SimpleNamespace(
            num_stages=ranks * each,
            stage_index=index,
            group_size=ranks,
            group_rank=0,
            is_last=False,
            submod=nn.Identity(),
        )
        for index in range(each)
    ]
    order = make_schedule(schedule, stages, microbatches).pipeline_order  # type: ignore[arg-type]
    queues = []
    for rank in range(ranks):
        counts: Counter[tuple[str, int]] = Counter()
        queues.append(queue := list[_Action]())
        for action in order[rank]:
            kind = "" if action is None else action.computation_type.value
            if kind in (_FORWARD, _BACKWARD, _FOR_INPUT, _FOR_WEIGHT):
                queue.append((kind, action.stage_index, counts[kind, action.stage_index]))
                counts[kind, action.stage_index] += 1
    return queues


class _Played:
    """When each action ends."""

    def __init__(self, forward: list[float], backward: list[float], send: float, rank_of: list[int]) -> None:
        self._forward, self._backward, self._send, self._rank_of = forward, backward, send, rank_of
        self._ends: dict[_Action, float] = {}

    def run(self, queues: list[list[_Action]]) -> PipelineTime:
        """All actions of all ranks."""
        ranks = len(queues)
        done, free, busy = [0] * ranks, [0.0] * ranks, [0.0] * ranks
        while any(done[rank] < len(queue) for rank, queue in enumerate(queues)):
            moved = False
            for rank, queue in enumerate(queues):
                while done[rank] < len(queue):
                    kind, stage, batch = queue[done[rank]]
                    ready = self._ready(kind, stage, batch)
                    if ready is None:
                        break
                    seconds = self._seconds(kind, stage)
                    free[rank] = self._ends[kind, stage, batch] = max(free[rank], ready) + seconds
                    busy[rank] += seconds
                    done[rank] += 1
                    moved = True
            if not moved:
                waiting = [
                    "{1}{0}{2}".format(*queue[done[rank]])
                    for rank, queue in enumerate(queues)
                    if done[rank] < len(queue)
                ]
                raise ValueError(f"the schedule never ends: its ranks wait for one another at {', '.join(waiting)}")
        return PipelineTime(max(free), tuple(busy))

    def _seconds(self, kind: str, stage: int) -> float:
        if kind == _FORWARD:
            return self._forward[stage]
        return self._backward[stage] / (1 if kind == _BACKWARD else 2)

    def _ready(self, kind: str, stage: int, batch: int) -> float | None:
        """When what an action needs is there; None where that is not known yet."""
        if kind == _FOR_WEIGHT:
            return self._ends.get((_FOR_INPUT, stage, batch))
        if kind == _FORWARD:
            return 0.0 if stage == 0 else self._arrival((_FORWARD,), stage - 1, stage, batch)
        if stage == len(self._forward) - 1:
            return self._ends.get((_FORWARD, stage, batch))
        return self._arrival((_BACKWARD, _FOR_INPUT), stage + 1, stage, batch)

    def _arrival(self, kinds: tuple[str, ...], source: int, target: int, batch: int) -> float | None:
        ended = [self._ends[kind, source, batch] for kind in kinds if (kind, source, batch) in self._ends]
        if not ended:
            return None
        return ended[0] + (0.0 if self._rank_of[source] == self._rank_of[target] else self._send)
