"""Lightning's steps through a pipeline: one batch, its micro-batches, what they log and return, on every rank."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_any, tree_leaves, tree_map
from torchmetrics import Metric

from lightning_memopt.callbacks.micro_batch_metrics import LogRecord, LogsOfMicroBatches
from lightning_memopt.models.instance_patch import replaced
from lightning_memopt.parallel.pipeline.boundary import StageDone
from lightning_memopt.parallel.pipeline.pipeline import Pipeline
from lightning_memopt.parallel.pipeline.schedules import STAGES_EACH, number_of_micro_batches
from lightning_memopt.parallel.pipeline.stubs import is_stub
from lightning_memopt.parallel.refusal import StepRefused
from lightning_memopt.strategies.pipeline_lists import AppendedToLists, can_be_sent
from lightning_memopt.strategies.pipeline_metrics import MetricsOfBatch
from lightning_memopt.techniques.batches import (
    CannotCut,
    batch_size,
    copied,
    detached,
    merge_outputs,
    split_evenly,
    weigh,
)

if TYPE_CHECKING:
    from lightning_memopt.strategies.pipeline import PipelineParallelStrategy


class PipelineSteps:
    """Runs each batch of a trainer through a pipeline.

    Args:
        strategy: Whose it is.
        pipeline: What runs.
    """

    def __init__(self, strategy: "PipelineParallelStrategy", pipeline: Pipeline) -> None:
        assert strategy.lightning_module is not None
        self._strategy = strategy
        self._pipeline = pipeline
        self._module: pl.LightningModule = strategy.lightning_module
        self._trainer = self._module.trainer
        self._captured: Tensor | None = None
        self._captures = False
        self._metrics = {name: part for name, part in self._module.named_modules() if isinstance(part, Metric)}
        self._of_batch = MetricsOfBatch(self._metrics.values())
        self._stale: set[int] = set()  # ids of metrics, whose hashes are of their states
        self._compared: set[tuple[str, int]] = set()

    # What Lightning calls

    @contextmanager
    def in_loop(self) -> Iterator[None]:
        """Within the block the training loop's closures are these."""
        with ExitStack() as stack:
            optimization = self._trainer.fit_loop.epoch_loop.automatic_optimization
            stack.enter_context(replaced(optimization, _make_closure=self._make_closure))
            yield

    @contextmanager
    def metrics(self) -> Iterator[None]:
        """Within the block metrics compute on every rank from what the last stage gave them."""
        with ExitStack() as stack:
            stack.enter_context(self._of_batch.followed())
            for metric in self._metrics.values():
                stack.enter_context(replaced(metric, compute=partial(self._compute, metric, metric.compute)))
            yield

    @property
    def captures(self) -> bool:
        """Whether a backward is to be kept for the schedule."""
        return self._captures

    def capture(self, loss: Tensor) -> None:
        """In place of a backward: keep the loss, scaled as it is to be, for the backward of the schedule."""
        self._captured = loss

    def evaluate(self, name: str, batch: Any, rest: tuple[Any, ...], run: Callable[..., Any]) -> Any:
        """Run a step without backward, and return what it returns for the batch on every rank."""
        self._check_same_batch(name, batch)
        pieces, sizes, weights = self._split(name, batch)
        outputs: list[Any] = []
        appended = AppendedToLists(self._module)

        def step(index: int, is_last: bool) -> Tensor:
            logs.weight = weights[index]
            self._of_batch.begin_micro_batch()
            with appended.step(is_last):
                output = run(self._for_stage(pieces[index]), *rest)
            if is_last:
                outputs.append(detached(output))
            return torch.zeros(())

        with self._pipeline.random.apart(), self._logging() as logs:
            self._pipeline.evaluate(self._call(name, rest), self._key(name, rest), pieces, step)
        merged = merge_outputs(outputs, sizes, weights) if outputs else None
        return self._finish(merged, logs, appended, sizes, weights)

    # Training

    def _make_closure(self, kwargs: OrderedDict[str, Any], optimizer: Optimizer, batch_idx: int) -> Closure:
        train = self._strategy.refused_steps()(self._train)
        return Closure(step_fn=partial(train, kwargs, optimizer, batch_idx))

    def _train(self, kwargs: OrderedDict[str, Any], optimizer: Optimizer, batch_idx: int) -> ClosureResult:
        optimization = self._trainer.fit_loop.epoch_loop.automatic_optimization
        zero_grad = optimization._make_zero_grad_fn(batch_idx, optimizer)
        if zero_grad is not None:
            zero_grad()  # before the forward, since the first backward comes before the last forward
        backward = optimization._make_backward_fn(optimizer)
        self._check_same_batch("training_step", kwargs["batch"])
        pieces, sizes, weights = self._split("training_step", kwargs["batch"])
        rest = tuple(value for key, value in kwargs.items() if key != "batch")
        outputs: list[Any] = []
        appended = AppendedToLists(self._module)
        after_first = ExitStack()

        def step(index: int, is_last: bool) -> Tensor:
            logs.weight = weights[index]
            self._of_batch.begin_micro_batch()
            with appended.step(is_last):
                result = self._step_of(optimization, kwargs | {"batch": self._for_stage(pieces[index])})
            assert result.closure_loss is not None
            if not is_last:  # of a step that skipped all later stages, which is refused
                return result.closure_loss
            outputs.append(detached({"loss": result.closure_loss, "extra": result.extra}))
            return self._scaled(backward, weigh(result.closure_loss, weights[index]), after_first)

        with self._pipeline.random.apart(), self._logging() as logs, after_first:
            runs = self._pipeline.train if backward is not None else self._pipeline.evaluate
            if backward is not None and not self._has_last_stage:
                self._scaled(backward, torch.zeros((), device=self._pipeline.device), after_first)
            runs(self._call("training_step", rest), self._key("training_step", rest), pieces, step)
        if backward is not None and not self._trainer.fit_loop._should_accumulate():
            self._pipeline.sum_shared_gradients()
        merged = merge_outputs(outputs, sizes, weights) if outputs else None
        output = self._finish(merged, logs, appended, sizes, weights)
        if backward is not None:
            self._strategy.post_backward(output["loss"])
            self._strategy.precision_plugin.post_backward(output["loss"], self._module)
        return ClosureResult(output["loss"], extra=output["extra"])

    def _step_of(self, optimization: Any, kwargs: Any) -> ClosureResult:
        fx = self._module._current_fx_name
        try:
            return optimization._make_step_fn(kwargs)()
        except StageDone as done:
            self._strategy.begin_backward_at(done.tensors)
            raise
        finally:
            self._module._current_fx_name = fx  # Lightning does not put it back where a stage unwinds the step

    def _scaled(self, backward: Callable[[Tensor], None] | None, loss: Tensor, after_first: ExitStack) -> Tensor:
        """The loss as the backward of the strategy, the precision plugin and callbacks would scale it."""
        if backward is None:
            return loss
        self._captures = True
        try:
            backward(loss)
        finally:
            self._captures = False
        assert self._captured is not None
        scaled, self._captured = self._captured, None
        for listener in (*self._trainer.callbacks, self._module):  # type: ignore[attr-defined]
            after_first.enter_context(replaced(listener, on_before_backward=_do_nothing))
        return scaled

    # What ranks tell each other

    @property
    def _has_last_stage(self) -> bool:
        return dist.get_rank() == self._pipeline.last_rank

    def _finish(
        self,
        output: Any,
        logs: LogsOfMicroBatches,
        appended: AppendedToLists,
        sizes: Sequence[int | None],
        weights: Sequence[float | Tensor],
    ) -> Any:
        """Give every rank what the last stage returned, logged and appended, and whether it is the last step."""
        self._stale = set(map(id, self._metrics.values()))
        lists: dict[str, list[Any]] = {}

        def told() -> tuple[Any, ...]:
            lists.update(appended.merged(sizes, weights))
            sent = {name: items for name, items in lists.items() if can_be_sent(items)}
            records = logs.records() if self._has_last_stage else []  # where a rank is predicted, it may be another
            return output, records, self._trainer.should_stop, sent, random.drawn

        random = self._pipeline.random
        output, records, stops, sent, drawn = self._from_last_stage(told)
        random.go_on_from(drawn)
        appended.extend(lists if self._has_last_stage else sent)
        if stops:  # where the step set it behind the last block, the other stages have not been
            self._trainer.should_stop = True
        results = self._trainer._results
        for record in records:
            value = record.value
            if record.is_metric:
                metric: Any = self._metrics[record.options["metric_attribute"]]
                metric._forward_cache, value = value, metric
            assert results is not None
            results.log(record.fx, record.name, value, sync_dist_fn=self._strategy.reduce, **record.options)
        return output

    def _from_last_stage(self, told_there: Callable[[], Any]) -> Any:
        """What the function returns on the last stage; a refusal there is one on all ranks, which would wait."""
        told: list[Any] = [None]
        if self._has_last_stage:
            try:
                told = [tree_map(_to_host, told_there(), is_leaf=_is_record)]
            except StepRefused as refusal:
                told = [refusal]
        dist.broadcast_object_list(told, src=self._pipeline.last_rank, group=self._pipeline.group)
        if isinstance(told[0], StepRefused):
            raise told[0]
        return tree_map(self._to_device, told[0], is_leaf=_is_record)

    def _to_device(self, leaf: Any) -> Any:
        if isinstance(leaf, LogRecord):
            leaf.value = tree_map(self._to_device, leaf.value)
            return leaf
        return leaf.to(self._pipeline.device) if isinstance(leaf, Tensor) else leaf

    def _compute(self, metric: Metric, compute: Callable[[], Any]) -> Any:
        """In place of a metric's: with the states that it has on the last stage."""
        if not self._pipeline.is_running and id(metric) in self._stale:
            self._stale.discard(id(metric))
            names = (*metric._defaults, "_update_count")
            states = self._from_last_stage(lambda: {name: getattr(metric, name) for name in names})
            for name, value in states.items():
                setattr(metric, name, value)
            metric._computed = None
        return compute()

    @contextmanager
    def _logging(self) -> Iterator[LogsOfMicroBatches]:
        self._of_batch.begin_batch()
        logs = LogsOfMicroBatches(self._of_batch.twin)
        results = self._trainer._results
        with nullcontext() if results is None else replaced(results, log=logs.log):
            yield logs

    # Batches

    def _check_same_batch(self, name: str, batch: Any) -> None:
        """In an epoch's first batch of each kind: stages compute with their own copies of what must be one batch."""
        kind = (name, self._trainer.current_epoch)
        if kind in self._compared:
            return
        self._compared.add(kind)
        sums = [float(leaf.double().sum()) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        all_sums: list[Any] = [None] * dist.get_world_size(self._pipeline.group)
        dist.all_gather_object(all_sums, str(sums), group=self._pipeline.group)
        if len(set(all_sums)) > 1:
            raise MisconfigurationException(
                f"{type(self._strategy).__name__}: the ranks have different batches (their tensors' sums are "
                f"{'; '.join(all_sums)}), and stages of one pipeline need the same. Shuffle and augment from one "
                "seed on all ranks (`seed_everything`; Lightning's `DistributedSampler` does for shuffling)."
            )

    def _split(self, name: str, batch: Any) -> tuple[list[Any], list[int | None], list[float | Tensor]]:
        strategy = self._strategy
        if strategy.microbatches == 1:
            return [batch], [None], [1.0]
        try:
            samples = batch_size(batch)
        except CannotCut as error:
            if name == "training_step":
                raise refuse_to_cut(error) from error
            return [batch], [None], [1.0]
        count = number_of_micro_batches(
            strategy.microbatches, self._pipeline.schedule, dist.get_world_size(self._pipeline.group), samples
        )
        pieces = split_evenly(batch, count)
        sizes: list[int | None] = [batch_size(piece) for piece in pieces]
        counts = self._counts(name, pieces) or sizes
        total: Any = sum(counts)
        total = torch.where(total > 0, total, 1) if isinstance(total, Tensor) else total or 1
        return pieces, sizes, [counted / total for counted in counts]

    def _counts(self, name: str, pieces: Sequence[Any]) -> list[Any]:
        """What micro-batches weigh; none where they are evaluated and cannot be counted, as those without labels."""
        try:
            return [self._strategy.count(piece) for piece in pieces]
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            if name == "training_step":
                raise
            if name != "predict_step":  # of which nothing is a mean
                rank_zero_warn(
                    f"{type(self._strategy).__name__}: micro-batches of `{name}` weigh by samples, since they cannot "
                    f"be counted as those of training are ({type(error).__name__}: {error})."
                )
            return []

    def _for_stage(self, micro_batch: Any) -> Any:
        """The step may change its batch, and runs once for each stage of the rank."""
        return copied(micro_batch) if STAGES_EACH[self._pipeline.schedule] > 1 else micro_batch

    def _call(self, name: str, rest: tuple[Any, ...]) -> Callable[[Any, Any], Any]:
        return partial(self._strategy.call_on, name, rest)

    def _key(self, name: str, rest: tuple[Any, ...]) -> Any:
        return name, rest[1:]  # the first of the rest is the number of the batch


def refuse_to_cut(error: CannotCut) -> StepRefused:
    """The error that says of a batch what it is, and what to do where a pipeline cuts it."""
    return StepRefused(
        f"{error.found}, and a pipeline cuts batches into micro-batches; return tensors whose first dimension is the "
        "samples from the `collate_fn`, or give microbatches=1, which leaves batches whole."
    )


def _is_record(leaf: Any) -> bool:
    return isinstance(leaf, LogRecord)


def _to_host(leaf: Any) -> Any:
    if isinstance(leaf, LogRecord):
        if tree_any(is_stub, leaf.value):
            raise StepRefused(
                f"`{leaf.name}` is logged from a value that is computed before the last stage, which has no values "
                "of it; log what the loss is computed from."
            )
        return LogRecord(leaf.fx, leaf.name, tree_map(_to_host, leaf.value), leaf.is_metric, leaf.options)
    if is_stub(leaf):
        raise StepRefused(
            "the step returns a value that is computed before the last stage, which has no values of it; return what "
            "the loss is computed from."
        )
    return leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf


def _do_nothing(*_: Any) -> None:
    pass
