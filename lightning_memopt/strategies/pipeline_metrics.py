"""What metrics are for a batch of which each micro-batch is seen alone."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_any
from torchmetrics import Metric

from lightning_memopt.models.copying import copy_module
from lightning_memopt.models.instance_patch import replaced


class MetricsOfBatch:
    """Gives each metric a twin that sees all micro-batches of the batch and no other.

    What a metric returns is of the micro-batch, and not all metrics of a batch are the means of those: one over
    classes is not, where micro-batches have others. The twin computes what the metric would for the whole batch.

    Args:
        metrics: Those of the module.
    """

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)
        self._twins: dict[tuple[int, int], Metric] = {}  # by the metric's id, as its hash is of its states
        self._calls: Counter[int] = Counter()

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Within the block twins see what metrics are called with."""
        with ExitStack() as stack:
            for metric in self._metrics:
                stack.callback(metric.register_forward_hook(self._hook(), with_kwargs=True).remove)
            yield

    def begin_batch(self) -> None:
        """Forget the batch before."""
        for twin in self._twins.values():
            twin.reset()

    def begin_micro_batch(self) -> None:
        """Each call of a step has its own twin, so they are counted from here on."""
        self._calls.clear()

    def twin(self, metric: Metric) -> Metric | None:
        """That of the last call; ``None`` where it was called with no samples."""
        return self._twins.get((id(metric), self._calls[id(metric)]))

    def _hook(self) -> Callable[[nn.Module, Any, Any, Any], None]:
        def see(metric: nn.Module, args: Any, kwargs: Any, _: Any) -> None:  # a function, which copies do not copy
            assert isinstance(metric, Metric)
            self._calls[id(metric)] += 1
            if not tree_any(_holds_samples, (args, kwargs)):
                return  # a metric of a loss: means of micro-batches, weighted as they are, are that of the batch
            key = id(metric), self._calls[id(metric)]
            if key not in self._twins:
                self._twins[key] = _twin_of(metric)
            self._twins[key].update(*args, **kwargs)

        return see


def _twin_of(metric: Metric) -> Metric:
    with ExitStack() as stack:
        for part in metric.modules():
            if isinstance(part, Metric):
                stack.enter_context(replaced(part, process_group=None))  # which cannot be copied
        twin = copy_module(metric)
    twin.reset()
    twin.distributed_available_fn = lambda: False  # the other stages do not compute it
    return twin


def _holds_samples(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0
