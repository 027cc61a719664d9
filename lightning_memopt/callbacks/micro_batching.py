"""Lightning's side of micro-batching."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_memopt.callbacks.micro_batch_metrics import LogsOfMicroBatches, MetricSnapshot
from lightning_memopt.models.compiled import is_compiled
from lightning_memopt.models.fake import holds_fakes
from lightning_memopt.models.instance_patch import Patches, replaced
from lightning_memopt.models.lazy import refuse_uninitialized
from lightning_memopt.parallel.agreement import takes_batch_statistics
from lightning_memopt.techniques.batches import Split, batch_size, micro_batches
from lightning_memopt.techniques.counting import Count, counter
from lightning_memopt.techniques.mean_over_targets import CountTargets, are_proportional
from lightning_memopt.techniques.micro_batching import (
    WHOLE_BATCH,
    average_gradients,
    backward_in_micro_batches,
    halve_on_out_of_memory,
)
from lightning_memopt.techniques.own_writes import OwnWrites
from lightning_memopt.techniques.snapshot import StepSnapshot

Value = TypeVar("Value")

_WATCHED_BATCHES = 3
"""In the first a teacher that begins as a copy of what is trained may be written what it was."""


class MicroBatching(Callback):
    """Runs forward and backward of each batch a few samples at a time, for the same update with less memory.

    The loader, the batch size, the learning rate and ``trainer.global_step`` stay as they are: only the activations
    of one micro-batch exist at a time. The loss of the batch is the mean over its micro-batches, weighted by samples,
    so a smaller last micro-batch is right too. Logged values come out as for the whole batch: means by the same
    weights, and with ``reduce_fx="sum"`` (``"min"``, ``"max"``) the sum over the micro-batches, which is right for
    counts; log a mean as a mean, since its sum grows with the number of micro-batches. A ``training_step`` that
    returns a dict has its tensors of one row a sample concatenated, detached
    (:func:`~lightning_memopt.techniques.batches.merge_outputs`). ``on_before_backward`` is called before the first
    backward of a batch, ``on_after_backward`` after the last, and gradients are cleared before the forward instead of
    after it.

    With ``size="auto"`` the whole batch is tried first. When memory runs out, in the forward or in the backward, the
    random state, buffers, metrics and pending gradients are brought back and the same batch is run again in
    micro-batches of half the size, on all devices alike; the size is kept from then on and in checkpoints. On several
    devices gradients are averaged once all are through, instead of during the backward, which needs replicas (DDP);
    other strategies need a fixed size. What ``training_step`` keeps in attributes of its own is not undone.

    Args:
        size: Samples in a micro-batch, or ``"auto"``.
        normalize: What the loss is a mean over: ``"samples"``, or ``"tokens"`` as for ``GradientAccumulation``.
        count: With ``normalize="tokens"``: a function that counts a batch's tokens, as a number or a tensor.
        mask_key: With ``normalize="tokens"``, instead of ``count``: the mask, or the labels (-100 is ignored).
        split: Cuts batches that :func:`~lightning_memopt.techniques.batches.micro_batches` cannot, such as graphs: a
            function (batch, size) -> list of micro-batches.

    Raises:
        MisconfigurationException: For bad arguments at once, for manual optimization and for ``"auto"`` under a
            strategy that cannot repeat a batch at the start of ``fit``, for a batch that cannot be split when it
            comes.
        torch.OutOfMemoryError: One sample does not fit.

    Source:
        Micro-batches are those of Huang et al. 2019 (https://arxiv.org/abs/1811.06965).

    Example:
        >>> trainer = pl.Trainer(callbacks=[MicroBatching(4)], logger=False)
    """

    def __init__(
        self,
        size: int | Literal["auto"] = "auto",
        *,
        normalize: Literal["samples", "tokens"] = "samples",
        count: Count | None = None,
        mask_key: str | int | None = None,
        split: Split = micro_batches,
    ) -> None:
        if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise MisconfigurationException(f"size={size!r} is no number of samples: give 1 or more, or 'auto'.")
        if not callable(split):
            raise MisconfigurationException(
                f"split={split!r} is no function; give one (batch, size) -> list of micro-batches."
            )
        if normalize not in ("samples", "tokens"):
            raise MisconfigurationException(
                f"normalize={normalize!r} is unknown; micro-batches weigh by 'samples' or by 'tokens'."
            )
        try:
            self._count = counter(normalize, count, mask_key)
        except ValueError as error:
            raise MisconfigurationException(f"MicroBatching: {error}") from error
        self._by_samples = normalize == "samples"
        self._is_auto = size == "auto"
        self._size = WHOLE_BATCH if size == "auto" else size
        self._split = split
        self._undo = Patches()
        self._looks_at_loss = False
        self._looks_for_writes = 0  # in so many batches

    @property
    def size(self) -> int | None:
        """Samples in a micro-batch now; ``None`` while ``"auto"`` has not had to split."""
        return None if self._size == WHOLE_BATCH else self._size

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"MicroBatching cannot work here: `{type(pl_module).__name__}` optimizes manually "
                "(`automatic_optimization = False`), so its backward is its own. Call "
                "`techniques.micro_batching.backward_in_micro_batches` in `training_step`."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_auto:
            _refusing(refuse_uninitialized)(pl_module)
            if problem := _why_not_auto(trainer, pl_module):
                raise MisconfigurationException(f"MicroBatching(size='auto') cannot work here: {problem}")
        _warn_of_batch_norm(pl_module)
        if is_overridden("backward", pl_module):
            rank_zero_warn(
                f"MicroBatching calls `{type(pl_module).__name__}.backward` once for each micro-batch, with its "
                "share of the loss. What it adds to gradients besides those of it (a penalty on weights, say) is "
                "added as often; add it to the loss in `training_step` instead."
            )
        # The compiler would trace what looks on, and a prediction would count it.
        self._looks_at_loss = self._by_samples and not (is_compiled(pl_module) or holds_fakes(pl_module))
        # Where ranks hold shards, the parameters that a step finds are other tensors than before it.
        holds_whole = trainer.world_size == 1 or isinstance(trainer.strategy.model, DistributedDataParallel)
        self._looks_for_writes = _WATCHED_BATCHES if holds_whole and not holds_fakes(pl_module) else 0
        optimization = trainer.fit_loop.epoch_loop.automatic_optimization
        self._undo.enter_context(replaced(optimization, _make_closure=partial(self._make_closure, trainer)))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"size": self.size}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._is_auto and state_dict["size"] is not None:
            self._size = state_dict["size"]

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._undo.close()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._undo.close()

    def _make_closure(
        self, trainer: pl.Trainer, kwargs: OrderedDict[str, Any], optimizer: Optimizer, batch_idx: int
    ) -> Closure:
        """In place of the loop's: a closure that has done the backward when its step function returns."""
        if "batch" not in kwargs:
            raise MisconfigurationException(
                "MicroBatching cannot work here: `training_step` takes the loader's iterator (`dataloader_iter`) and "
                "so draws its batches itself. Let it take a batch."
            )
        return Closure(step_fn=partial(self._run_batch, trainer, kwargs, optimizer, batch_idx))

    def _run_batch(
        self, trainer: pl.Trainer, kwargs: OrderedDict[str, Any], optimizer: Optimizer, batch_idx: int
    ) -> ClosureResult:
        optimization = trainer.fit_loop.epoch_loop.automatic_optimization
        zero_grad = optimization._make_zero_grad_fn(batch_idx, optimizer)
        if zero_grad is not None:
            zero_grad()  # before the forward, since the first backward comes before the last forward
        backward = optimization._make_backward_fn(optimizer)
        attempt = partial(self._attempt, trainer, kwargs, backward)
        run = partial(self._until_it_fits, trainer, attempt, kwargs["batch"]) if self._is_auto else attempt
        output, logs = run(self._size)
        assert trainer._results is not None
        logs.flush(trainer._results.log)
        if backward is not None:
            call._call_callback_hooks(trainer, "on_after_backward")
            call._call_lightning_module_hook(trainer, "on_after_backward")
        return ClosureResult(None) if output is None else ClosureResult(output["loss"], extra=output["extra"])

    def _until_it_fits(self, trainer: pl.Trainer, attempt: Callable[[int], Value], batch: Any, size: int) -> Value:
        module = trainer.lightning_module
        if holds_fakes(module):
            return attempt(size)  # fake tensors need no memory, and have no values to bring back
        snapshots = (StepSnapshot(module), MetricSnapshot(module))
        writes = OwnWrites(module, thoroughly=False)

        def restore() -> None:
            if written := writes.names():
                raise MisconfigurationException(
                    "MicroBatching cannot repeat this batch, in which memory ran out: `training_step` of "
                    f"`{type(module).__name__}` writes to `{written[0]}` itself and would do so again. Move that to "
                    "`on_train_batch_start` or `on_train_batch_end`, which are called once for a batch."
                )
            for snapshot in snapshots:
                snapshot.restore()

        replicas = trainer.strategy.model if trainer.world_size > 1 else None
        if isinstance(replicas, DistributedDataParallel):
            # A rank that fails in the forward does not get to switch off the next one's broadcast of buffers.
            replicas.require_forward_param_sync = False
        samples = _refusing(self._samples)(batch)
        result, fits = halve_on_out_of_memory(
            attempt, size, samples, restore=restore, agree=partial(_smallest, trainer)
        )
        if fits != size:
            rank_zero_info(f"MicroBatching: out of memory; from here on in micro-batches of {fits}")
            self._size = fits
        if isinstance(replicas, DistributedDataParallel):
            replicas.require_forward_param_sync = True  # validation broadcasts, as it would have
            if not trainer.fit_loop._should_accumulate():
                average_gradients(module.parameters())
        return result

    def _watch_writes(self, trainer: pl.Trainer) -> OwnWrites | None:
        if self._looks_for_writes == 0:
            return None
        self._looks_for_writes -= 1
        return OwnWrites(trainer.lightning_module, thoroughly=True)

    def _samples(self, batch: Any) -> int:
        return batch_size(batch) if self._split is micro_batches else len(self._split(batch, 1))

    def _attempt(
        self, trainer: pl.Trainer, kwargs: OrderedDict[str, Any], backward: Callable[[Tensor], None] | None, size: int
    ) -> tuple[Any, LogsOfMicroBatches]:
        """One run of the batch, which changes only what snapshots bring back: what it logs is yet to be flushed."""
        optimization = trainer.fit_loop.epoch_loop.automatic_optimization
        results = trainer._results
        assert results is not None
        logs = LogsOfMicroBatches()
        after_first = ExitStack()
        is_first = True
        looks_at_loss = self._looks_at_loss and size != WHOLE_BATCH
        writes = self._watch_writes(trainer) if size != WHOLE_BATCH else None
        seen: list[CountTargets] = []
        weights: list[float | Tensor] = []

        def step(micro_batch: Any) -> dict[str, Any]:
            result = optimization._make_step_fn(kwargs | {"batch": micro_batch})()
            return {"loss": result.closure_loss, "extra": result.extra}

        def backward_once_hooked(loss: Tensor) -> None:
            nonlocal is_first
            if backward is not None:
                backward(loss)
            if is_first:
                after_first.enter_context(_silenced(trainer, "on_before_backward"))
                is_first = False

        @contextmanager
        def around(weight: float | Tensor, is_last: bool) -> Iterator[None]:
            logs.weight = weight
            weights.append(weight)
            targets = CountTargets()
            seen.append(targets)
            # Gradients of several attempts must not meet: with "auto" they are averaged when all ranks are through.
            with (
                _block_parallel_sync_behavior(trainer.strategy, block=self._is_auto or not is_last),
                targets if looks_at_loss else nullcontext(),
            ):
                yield

        with after_first, _silenced(trainer, "on_after_backward"), replaced(results, log=logs.log):
            output = backward_in_micro_batches(
                step,
                kwargs["batch"],
                size,
                count=_refusing(self._count),
                split=_refusing(self._split),
                backward=backward_once_hooked,
                around=around,
            )
        if writes is not None and len(weights) > 1 and (written := writes.names()):
            self._looks_for_writes = 0
            _warn_of_writes(trainer.lightning_module, written)
        if looks_at_loss and len(weights) > 1:
            self._looks_at_loss = False
            _warn_of_loss(trainer.lightning_module, seen, [float(weight) for weight in weights])
        return output, logs


@contextmanager
def _silenced(trainer: pl.Trainer, hook: str) -> Iterator[None]:
    """Within the block neither the callbacks nor the module have ``hook`` called."""
    with ExitStack() as stack:
        for listener in (*trainer.callbacks, trainer.lightning_module):  # type: ignore[attr-defined]
            stack.enter_context(replaced(listener, **{hook: _do_nothing}))
        yield


def _refusing(function: Callable[..., Value]) -> Callable[..., Value]:
    """``function`` with its ``ValueError`` turned into Lightning's error for what a user has to change."""

    def refusing(*args: Any) -> Value:
        try:
            return function(*args)
        except ValueError as error:
            raise MisconfigurationException(f"MicroBatching: {error}") from error

    return refusing


def _do_nothing(*_: Any) -> None:
    pass


def _smallest(trainer: pl.Trainer, size: int) -> int:
    if trainer.world_size == 1:
        return size
    known = torch.tensor(size, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(known, torch.distributed.ReduceOp.MIN)
    return int(known)


def _why_not_auto(trainer: pl.Trainer, module: pl.LightningModule) -> str | None:
    if trainer.world_size == 1:
        return None
    if not isinstance(trainer.strategy.model, DistributedDataParallel):
        return (
            f"under {type(trainer.strategy).__name__} devices exchange parameters during the step, so one that runs "
            "out of memory leaves the others waiting. Give a size that fits, `MicroBatching(size=...)`, or use DDP."
        )
    for name, submodule in module.named_modules():
        if isinstance(submodule, nn.SyncBatchNorm):
            return (
                f"`{name}` is a SyncBatchNorm, which exchanges statistics during the forward, so a device that runs "
                "out of memory leaves the others waiting. Give a size that fits, `MicroBatching(size=...)`."
            )
    return None


def _warn_of_loss(module: pl.LightningModule, seen: list[CountTargets], weights: list[float]) -> None:
    counts = [targets.counts for targets in seen]
    name = type(module).__name__
    if any(targets.compares_samples for targets in seen):
        rank_zero_warn(
            f"MicroBatching changes the loss of `{name}`, which compares the samples of a batch with each other: "
            "those of a micro-batch are compared among themselves alone. Keep such batches whole; "
            "ActivationCheckpointing leaves them so."
        )
    elif not are_proportional(counts, weights):
        found = ", ".join(str(int(sum(each))) for each in counts[:4]) + (", ..." if len(counts) > 4 else "")
        rank_zero_warn(
            f"MicroBatching weighs micro-batches by samples, but the loss of `{name}` is a mean over the targets "
            f"that it does not ignore, and they hold {found} of these: the update is not that of the whole batch. "
            "Give `normalize='tokens'` and what is counted: `mask_key`, or `count`."
        )


def _warn_of_writes(module: pl.LightningModule, written: list[str]) -> None:
    others = f" and {len(written) - 1} more" if len(written) > 1 else ""
    rank_zero_warn(
        f"MicroBatching changes what `{type(module).__name__}` trains: its `training_step` writes to `{written[0]}`"
        f"{others} itself, as to a teacher or a running average, and now does so once for each micro-batch. Where it "
        "need not be in the forward, move it to `on_train_batch_start` or `on_train_batch_end`: once a batch."
    )


def _warn_of_batch_norm(module: pl.LightningModule) -> None:
    names = [name for name, submodule in module.named_modules() if takes_batch_statistics(submodule)]
    if names:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        rank_zero_warn(
            f"MicroBatching changes what `{names[0]}`{others} computes: it takes mean and variance over the "
            "micro-batch instead of the batch, and updates its running statistics once for each. The update is no "
            "longer that of the whole batch; GroupNorm or LayerNorm would leave it so."
        )
