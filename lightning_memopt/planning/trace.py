"""Trace the step of a module with techniques on, once for each choice of them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils._pytree import tree_leaves

from lightning_memopt.memory.report import TimelinePoint
from lightning_memopt.planning.operators import OperatorCall, OperatorLog
from lightning_memopt.planning.predict import Module, predict_step
from lightning_memopt.planning.search import Refused
from lightning_memopt.planning.space import Techniques
from lightning_memopt.techniques.batches import batch_size, micro_batches
from lightning_memopt.techniques.lazy_logits import LogitsNotFormedError

_WHOLE_TIMELINE = 10**7


@dataclass(frozen=True)
class StepTrace:
    """One predicted optimizer step.

    Attributes:
        points: Memory in use after each change, in order.
        operators: What ran.
        notes: What the figures leave out.
    """

    points: tuple[TimelinePoint, ...]
    operators: tuple[OperatorCall, ...]
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> TimelinePoint:
        """The largest point."""
        return max(self.points, key=lambda point: point.total_bytes)


class StepTracer:
    """Traces of one module and batch, kept.

    Args:
        module: A LightningModule, or a function that makes one.
        batch: One batch of one device.
        trainer_options: Arguments of ``pl.Trainer`` that every plan shares.
    """

    def __init__(self, module: Module, batch: Any, trainer_options: Mapping[str, Any]) -> None:
        self._module = module
        self._batch = batch
        self._options = dict(trainer_options)
        self._known: dict[Techniques, StepTrace | str] = {}

    @property
    def count(self) -> int:
        """How many traces were made."""
        return len(self._known)

    def known(self, techniques: Techniques) -> StepTrace | None:
        """The trace if it was made."""
        trace = self._known.get(techniques)
        return trace if isinstance(trace, StepTrace) else None

    def trace(self, techniques: Techniques) -> StepTrace:
        """The step with these techniques on.

        Raises:
            Refused: One of them does not take the module.
            ValueError: The step cannot be predicted at all.
        """
        if techniques not in self._known:
            try:
                self._known[techniques] = self._run(techniques)
            except (MisconfigurationException, LogitsNotFormedError) as refusal:
                self._known[techniques] = str(refusal)
        known = self._known[techniques]
        if isinstance(known, str):
            raise Refused(known)
        return known

    def _run(self, techniques: Techniques) -> StepTrace:
        batch, repeats, left_out_bytes = self._batch, 1.0, 0
        size = techniques.micro_batch
        if size is not None:
            # The third micro-batch and those after it repeat the second: gradients are there, activations come again.
            samples = batch_size(batch)
            batch = micro_batches(batch, 2 * size)[0]
            repeats = samples / batch_size(batch)
            left_out_bytes = _size_bytes(self._batch) - _size_bytes(batch)
        log = OperatorLog()
        report = predict_step(
            self._module,
            batch,
            callbacks=techniques.callbacks("cpu"),
            log=log,
            timeline_points=_WHOLE_TIMELINE,
            precision=techniques.precision,
            **self._options,
        )
        points = report.timeline
        if left_out_bytes:
            points = tuple(_with_more(point, "other", left_out_bytes) for point in points)
        return StepTrace(points, tuple(_repeated(log.calls, repeats)), report.notes)


def _with_more(point: TimelinePoint, category: str, size_bytes: int) -> TimelinePoint:
    return replace(point, by_category={**point.by_category, category: point.by_category[category] + size_bytes})


def _repeated(calls: list[OperatorCall], times: float) -> list[OperatorCall]:
    if times == 1:
        return calls
    return [call if call.part == "optimizer" else call._replace(count=call.count * times) for call in calls]


def _size_bytes(batch: Any) -> int:
    leaves = tree_leaves(dict(batch) if hasattr(batch, "keys") else batch)
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
