"""What micro-batches do to logged values and metrics, and how it comes out as for the whole batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_memopt.techniques.batches import weigh


@dataclass
class LogRecord:
    """One value that a step logs for its batch.

    Attributes:
        fx: The step.
        name: As logged.
        value: For the batch.
        is_metric: Whether a metric was logged, whose value of this step ``value`` is.
        options: Of Lightning's log method.
    """

    fx: str
    name: str
    value: Any
    is_metric: bool
    options: dict[str, Any]


class LogsOfMicroBatches:
    """Collects what a step logs once for each micro-batch, to log it once for the batch.

    A value that the user reduces by mean becomes the mean weighted as the loss is (or by the ``batch_size`` that it
    was logged with); sums, minima and maxima are reduced so. Of a ``torchmetrics.Metric`` it is the value of this
    step; its epoch value needs nothing, since each micro-batch updated it. Synchronization over devices happens once,
    when all micro-batches are through.

    Args:
        of_batch: Gives of a metric another one that computes its value for the batch, if there is one.

    Attributes:
        weight: What the micro-batch that is running weighs.
    """

    def __init__(self, of_batch: Callable[[Metric], Metric | None] = lambda _: None) -> None:
        self.weight: float | Tensor = 1
        self._of_batch = of_batch
        self._entries: dict[tuple[str, str], _Entry] = {}

    @torch.compiler.disable
    def log(
        self,
        fx: str,
        name: str,
        value: Any,
        *,
        batch_size: int | None = None,
        reduce_fx: Any = torch.mean,
        **options: Any,
    ) -> None:
        """In place of the log method of Lightning's result collection."""
        entry = self._entries.setdefault((fx, name), _Entry(value, reduce_fx, options))
        if isinstance(value, Metric):
            of_batch = self._of_batch(value) if options.get("on_step") else None
            entry.values.append(value._forward_cache if of_batch is None else of_batch)
        else:
            entry.values.append(value.detach())
        entry.weights.append(self.weight if batch_size is None else batch_size)
        if batch_size is not None:
            entry.batch_size = (entry.batch_size or 0) + batch_size

    def flush(self, log: Callable[..., None]) -> None:
        """Log each value once through ``log``, Lightning's own."""
        for (fx, name), entry in self._entries.items():
            value = entry.reduced()
            if isinstance(entry.logged, Metric):
                entry.logged._forward_cache = value
                value = entry.logged
            log(fx, name, value, batch_size=entry.batch_size, reduce_fx=entry.reduce_fx, **entry.options)

    def records(self) -> list[LogRecord]:
        """What :meth:`flush` would log, as values that other processes can be told."""
        return [
            LogRecord(
                fx, name, entry.reduced(), isinstance(entry.logged, Metric),
                {"batch_size": entry.batch_size, "reduce_fx": entry.reduce_fx}
                | {key: value for key, value in entry.options.items() if not key.startswith("sync_dist_")},
            )
            for (fx, name), entry in self._entries.items()
        ]  # fmt: skip


class MetricSnapshot:
    """The states of the metrics in a module, to undo the updates of a failed attempt."""

    def __init__(self, module: pl.LightningModule) -> None:
        self._states = [(metric, _copied(metric)) for metric in module.modules() if isinstance(metric, Metric)]

    def restore(self) -> None:
        """Put all of them back; may be called again."""
        for metric, state in self._states:
            vars(metric).update({name: _copy(value) for name, value in state.items()})


class _Entry:
    def __init__(self, logged: Any, reduce_fx: Any, options: dict[str, Any]) -> None:
        self.logged = logged
        self.reduce_fx = reduce_fx
        self.options = options
        self.values: list[Any] = []
        self.weights: list[float | Tensor] = []
        self.batch_size: int | None = None

    def reduced(self) -> Any:
        if isinstance(self.values[-1], Metric):
            return self.values[-1].compute()
        if len(self.values) == 1 or not all(isinstance(value, Tensor) for value in self.values):
            return self.values[-1]
        how = self.reduce_fx if isinstance(self.reduce_fx, str) else self.reduce_fx.__name__
        if isinstance(self.logged, Metric) or how in ("mean", "avg"):
            total = sum(self.weights)
            pairs = zip(self.values, self.weights, strict=True)
            return sum(weigh(_floating(value), weight / total) for value, weight in pairs)
        stacked = torch.stack(self.values)
        if how == "sum":
            return stacked.sum(dim=0)
        return stacked.amin(dim=0) if how == "min" else stacked.amax(dim=0)


def _floating(value: Tensor) -> Tensor:
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())


def _copied(metric: Metric) -> dict[str, Any]:
    return {name: _copy(value) for name, value in vars(metric).items()}


def _copy(value: Any) -> Any:
    """States are tensors or lists of tensors; what else a metric holds is not changed by an update."""
    if isinstance(value, Tensor):
        return value.clone()
    return list(value) if isinstance(value, list) else value
