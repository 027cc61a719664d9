"""Lightning's side of gradient accumulation."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_memopt.callbacks.accumulation_checks import (
    effective_batch_size,
    find_optimizer_problem,
    find_problem,
    loader_batch_size,
    replicas,
)
from lightning_memopt.models.instance_patch import Patches, replaced, with_property
from lightning_memopt.parallel.unreduced import unreduced_gradients
from lightning_memopt.techniques.accumulation import (
    GradientWindow,
    Schedule,
    accumulation_factor,
    check_schedule,
    count_optimizer_steps,
    factor_for_target,
    or_one,
)
from lightning_memopt.techniques.batches import weigh
from lightning_memopt.techniques.counting import Count, Normalize, check_whole, counter


class GradientAccumulation(Callback):
    """Steps the optimizer once in several batches, with the gradient of the one large batch that they make.

    Lightning's ``accumulate_grad_batches=k`` divides each loss by ``k``: the shorter window at the end of an epoch is
    scaled down, and a batch of few tokens weighs as much as one of many (Lightning's issues 19987 and 20350). Here
    each window is divided by what it holds. A new factor takes effect when a window begins, never inside one. The
    loss in ``outputs`` is what ``training_step`` returned, not divided; ``on_before_backward`` gets it scaled.

    A checkpoint in the middle of a window does not hold its gradients: resumed from, the window ends where it would
    have, with the batches that remain, divided by what these hold.

    Args:
        schedule: How many batches to accumulate: a number, a mapping ``{0: 8, 4: 2}`` from the first epoch (step) to
            the number from there on, or a function of the epoch (step).
        target_batch_size: Instead of ``schedule``: samples in an optimizer step, over all devices. The factor follows
            from the loader's batch size.
        by: Whether ``schedule`` counts epochs or optimizer steps.
        normalize: What weighs the same: each ``"batch"``, each of the ``"samples"`` or each of the ``"tokens"``. Take
            what the loss is a mean over.
        count: With ``normalize="tokens"``: a function that counts a batch's tokens, as a number or a tensor.
        mask_key: With ``normalize="tokens"``, instead of ``count``: the mask, or the labels (-100 is ignored).

    Raises:
        MisconfigurationException: For bad arguments at once; at the start of ``fit`` for manual optimization, another
            accumulation, LBFGS, or a ``target_batch_size`` that the loader's batches do not make; in the first window
            for steps that run their closure twice (SAM).

    Example:
        >>> accumulation = GradientAccumulation({0: 8, 1000: 2}, by="step", normalize="tokens", mask_key="labels")
        >>> trainer = pl.Trainer(callbacks=[accumulation], logger=False)
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        *,
        target_batch_size: int | None = None,
        by: Literal["epoch", "step"] = "epoch",
        normalize: Normalize = "batch",
        count: Count | None = None,
        mask_key: str | int | None = None,
    ) -> None:
        if (schedule is None) == (target_batch_size is None):
            raise MisconfigurationException(
                "GradientAccumulation needs either `schedule` or `target_batch_size`; "
                + ("neither was given." if schedule is None else "both were given.")
            )
        if by not in ("epoch", "step"):
            raise MisconfigurationException(f"by={by!r} is unknown; a schedule counts by 'epoch' or by 'step'.")
        try:
            if target_batch_size is not None:
                check_whole(target_batch_size, "target_batch_size", "samples")
            self._count = counter(normalize, count, mask_key)
            if schedule is not None:
                check_schedule(schedule)
        except ValueError as error:
            raise MisconfigurationException(f"GradientAccumulation: {error}") from error
        self._schedule = schedule
        self._target_batch_size = target_batch_size
        self._by = by
        self._normalize = normalize
        self._undo = Patches()
        self._start: int | None = None  # batches of the epoch before this window
        self._factor = 1
        self._announced: int | None = None
        self._unit: float | Tensor | None = None  # what a batch counts, roughly and on all devices
        self._window: GradientWindow | None = None
        self._clears = False
        self._added: float | Tensor = 0
        self._had_backward = False
        self._ran = False  # the closure of this batch, to its end

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if problem := find_problem(trainer, pl_module):
            raise MisconfigurationException(f"GradientAccumulation cannot work here: {problem}")
        self._announced = self._unit = self._window = self._start = None
        # So early because users ask for both in `configure_optimizers`.
        self._undo.enter_context(replaced(trainer, accumulate_grad_batches=1))
        if self._target_batch_size is None:
            assert self._schedule is not None
            trainer.accumulate_grad_batches = accumulation_factor(self._schedule, 0)
        lightnings = partial(type(trainer).estimated_stepping_batches.fget, trainer)  # type: ignore[attr-defined]
        estimated = partial(self._estimated_steps, trainer, lightnings)
        self._undo.enter_context(with_property(trainer, "estimated_stepping_batches", estimated))

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if problem := find_optimizer_problem(trainer.optimizers):
            raise MisconfigurationException(f"GradientAccumulation cannot work here: {problem}")
        loop = trainer.fit_loop.epoch_loop
        optimization = loop.automatic_optimization
        self._undo.enter_context(replaced(loop, _accumulated_batches_reached=partial(self._is_complete, trainer)))
        self._undo.enter_context(
            replaced(
                optimization,
                output_result_cls=_Undivided,
                _make_zero_grad_fn=partial(self._make_zero_grad, optimization),
                _make_backward_fn=partial(self._make_backward, optimization._make_backward_fn),
            )
        )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if _skips_backward(trainer):
            self._start = self._window = None
            return
        try:
            self._added = self._count(batch)
        except ValueError as error:
            raise MisconfigurationException(f"GradientAccumulation: {error}") from error
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if self._start is None or ready == 1 or not self._start < ready <= self._start + self._factor:
            self._start = ready - 1
            self._begin_window(trainer, batch)
        self._clears = self._window is None
        if self._window is None:
            self._window = self._new_window(trainer, pl_module)
        self._had_backward = self._ran = False
        self._scale = self._window.add(self._added, is_last=not trainer.fit_loop._should_accumulate())

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ran = True

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if not self._had_backward and self._window is not None:
            self._window.drop(self._added, is_last=True)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._window is None:
            return
        if trainer.fit_loop._should_accumulate():
            if not self._had_backward:
                self._window.drop(self._added, is_last=False)
        else:
            self._window = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"start": self._start, "factor": self._factor}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start = state_dict["start"]
        self._factor = state_dict["factor"]

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._undo.close()
        self._window = None

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._undo.close()
        self._window = None

    def _factor_for_target(self, trainer: pl.Trainer, target: int) -> int:
        try:
            return factor_for_target(target, loader_batch_size(trainer), replicas(trainer))
        except ValueError as error:
            raise MisconfigurationException(f"GradientAccumulation: {error}") from error

    def _estimated_steps(self, trainer: pl.Trainer, lightnings: Callable[[], float]) -> float:
        """In place of ``estimated_stepping_batches``, which divides all epochs by the factor of the moment."""
        estimated = lightnings()  # loads the data, where that is still to be done
        epochs, batches = trainer.max_epochs, trainer.num_training_batches
        if epochs is None or epochs == -1 or batches == math.inf:
            return estimated  # by `max_steps`
        schedule, target = self._schedule, self._target_batch_size
        if target is not None:
            schedule = self._factor_for_target(trainer, target)
        assert schedule is not None
        most = math.inf if trainer.max_steps == -1 else trainer.max_steps
        try:
            return count_optimizer_steps(schedule, int(batches), max(epochs, 1), self._by, most)
        except ValueError as error:
            raise MisconfigurationException(f"GradientAccumulation: {error}") from error

    def _begin_window(self, trainer: pl.Trainer, batch: Any) -> None:
        at = trainer.current_epoch if self._by == "epoch" else trainer.global_step
        if self._target_batch_size is not None:
            # Each time: a reloaded loader (`reload_dataloaders_every_n_epochs`) may have batches of another size, and
            # a fit that goes on within an epoch has no start of one.
            self._schedule = self._factor_for_target(trainer, self._target_batch_size)
        assert self._schedule is not None
        try:
            self._factor = accumulation_factor(self._schedule, at)
        except ValueError as error:
            raise MisconfigurationException(f"GradientAccumulation: {error}") from error
        trainer.accumulate_grad_batches = self._factor
        self._window = None
        if self._factor != self._announced:
            self._announced = self._factor
            rank_zero_info(effective_batch_size(batch, self._factor, replicas(trainer)))

    def _new_window(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> GradientWindow:
        mean = partial(self._mean_over_devices, trainer)
        if self._unit is None:
            self._unit = or_one(mean(self._added))
        return GradientWindow(
            [parameter for parameter in pl_module.parameters() if parameter.requires_grad],
            self._unit * self._factor,
            mean,
            partial(unreduced_gradients, pl_module),
        )

    def _mean_over_devices(self, trainer: pl.Trainer, number: float | Tensor) -> float | Tensor:
        """Where ranks share batches each counts as often as any other, so that the mean is that over batches."""
        if trainer.world_size == 1 or self._normalize == "batch":  # Lightning requires equally many batches
            return number
        counted = torch.as_tensor(number, device=trainer.strategy.root_device)
        reduced: Tensor = trainer.strategy.reduce(counted.float().clone(), reduce_op="mean")
        return reduced

    def _is_complete(self, trainer: pl.Trainer) -> bool:
        """In place of ``_accumulated_batches_reached``: does the window end with the current batch?"""
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if _skips_backward(trainer):
            return ready % trainer.accumulate_grad_batches == 0
        return self._start is None or ready - self._start >= self._factor

    def _make_zero_grad(self, optimization: Any, batch_idx: int, optimizer: Optimizer) -> Callable[[], None] | None:
        """In place of ``_make_zero_grad_fn``, which goes by ``batch_idx % accumulate_grad_batches``."""
        if optimization._skip_backward or not self._clears:
            return None

        def zero_grad() -> None:
            optimization._on_before_zero_grad(optimizer)
            optimization._optimizer_zero_grad(batch_idx, optimizer)

        return zero_grad

    def _make_backward(
        self, make_backward: Callable[[Optimizer], Callable[[Tensor], None] | None], optimizer: Optimizer
    ) -> Callable[[Tensor], None] | None:
        backward = make_backward(optimizer)
        if backward is None:
            return None

        def scaled_backward(loss: Tensor) -> None:
            if self._ran and not self._clears:
                raise MisconfigurationException(
                    "GradientAccumulation cannot work here: the closure of a window's last batch runs a second time "
                    f"(in an `optimizer_step` of yours, or in the step of {type(optimizer).__name__}), and the "
                    "gradients of the window's other batches are of the weights as they were before. Give it whole "
                    "batches (MicroBatching saves their activations), or run the closure once."
                )
            self._had_backward = True
            backward(weigh(loss, self._scale))

        return scaled_backward


class _Undivided(ClosureResult):
    """Keeps the loss that ``training_step`` returned as it is."""

    @classmethod
    @override
    def from_training_step_output(cls, training_step_output: Any, normalize: int = 1) -> ClosureResult:
        return super().from_training_step_output(training_step_output)


def _skips_backward(trainer: pl.Trainer) -> bool:
    """Whether this epoch only updates BatchNorm for StochasticWeightAveraging, which sets what it accumulates."""
    return trainer.fit_loop.epoch_loop.automatic_optimization._skip_backward
