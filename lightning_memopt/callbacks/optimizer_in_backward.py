"""Lightning's side of stepping the optimizer in the backward."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer
from typing_extensions import override

from lightning_memopt.models.fake import holds_fakes
from lightning_memopt.models.instance_patch import Patches, replaced
from lightning_memopt.models.lazy import refuse_uninitialized
from lightning_memopt.parallel.local import local_of
from lightning_memopt.techniques.optimizer_in_backward import BackwardStepper, step_in_backward
from lightning_memopt.techniques.per_parameter import check_steps_alone

_ACCUMULATING_CALLBACKS = ("GradientAccumulation", "GradientAccumulationScheduler", "MicroBatching")
"""By name, so that looking does not import them."""


class OptimizerInBackward(Callback):
    """Steps each parameter as soon as its gradient is complete and frees the gradient at once.

    Gradients never exist all together: at any moment there are those of the one or two parameters that the backward
    is working on. The optimizer, its state, its checkpoints and the learning-rate schedulers are the user's own,
    and the numbers are the same. Where ranks hold shards or parts (ZeRO, tensor parallelism) each steps its own, once
    their gradient is reduced. What needs all gradients at once is refused by name before the first step: clipping by
    norm, accumulation, fp16 loss scaling, replicas (DDP), pipelines, manual optimization, and optimizers whose step
    is joint (LBFGS); so is an ``optimizer_zero_grad`` that leaves gradients, when it does. Hooks that read
    gradients (``on_before_optimizer_step``) find none.

    Raises:
        MisconfigurationException: At the start of ``fit``, for what cannot work with it.

    Source:
        Lv et al. 2023 (https://arxiv.org/abs/2306.09782), here with the user's own optimizer.

    Example:
        >>> trainer = pl.Trainer(callbacks=[OptimizerInBackward()], logger=False)
    """

    def __init__(self) -> None:
        self._undo = Patches()
        self._stepper: BackwardStepper | None = None
        self._stepping: bool | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if problem := _find_problem(trainer, pl_module):
            raise MisconfigurationException(f"OptimizerInBackward cannot work here: {problem}")
        for listener in (pl_module, *_users_callbacks(trainer)):
            for hook in ("on_before_optimizer_step", "on_after_backward", "on_before_zero_grad"):
                if is_overridden(hook, listener):
                    rank_zero_warn(
                        f"`{type(listener).__name__}.{hook}` finds no gradients: OptimizerInBackward has used and "
                        "freed them by then. To look at a gradient, hook its parameter (`parameter.register_hook`)."
                    )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        try:
            refuse_uninitialized(pl_module)
            for optimizer in trainer.optimizers:
                check_steps_alone(optimizer)
        except ValueError as error:
            raise MisconfigurationException(f"OptimizerInBackward cannot work here: {error}") from error

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not in on_fit_start: other callbacks may change the optimizer there.
        clip_value = float(trainer.gradient_clip_val) if trainer.gradient_clip_val else None
        self._stepper = step_in_backward(pl_module, trainer.optimizers, clip_value=clip_value)
        self._undo.callback(self._stepper.remove)
        # The stepper clips; Lightning would after the backward, and torch cannot clip where no gradient is left.
        self._undo.enter_context(replaced(trainer, gradient_clip_val=None))
        if is_overridden("optimizer_step", pl_module):
            step = partial(self._note_step, trainer.strategy.optimizer_step)
            self._undo.enter_context(replaced(trainer.strategy, optimizer_step=step))
            self._stepping = False
        if is_overridden("optimizer_zero_grad", pl_module) and not holds_fakes(pl_module):
            clear = partial(self._clear, pl_module, pl_module.optimizer_zero_grad)
            self._undo.enter_context(replaced(pl_module, optimizer_zero_grad=clear))

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        if self._stepping is False:
            raise MisconfigurationException(
                f"OptimizerInBackward cannot work here: `{type(pl_module).__name__}.optimizer_step` runs the closure "
                "outside `optimizer.step`, so a batch can have a backward and no step. Call "
                "`optimizer.step(closure=optimizer_closure)` for each batch, or remove the callback."
            )

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._detach()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._stepper is not None and self._stepper.is_within_step:
            _save_nothing(trainer, exception)
        self._detach()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._detach()

    def _note_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._stepping = True
        try:
            return step(*args, **kwargs)
        finally:
            self._stepping = False

    def _clear(
        self, module: pl.LightningModule, clear: Callable[..., None], epoch: int, batch_idx: int, optimizer: Optimizer
    ) -> None:
        """The module's own ``optimizer_zero_grad``, which must clear a gradient that stands for all."""
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad and p.numel()]
        stand_in = min(trained, key=torch.Tensor.numel, default=None)
        if stand_in is not None:
            stand_in.grad = torch.ones_like(stand_in)
        clear(epoch, batch_idx, optimizer)
        if stand_in is None:
            return
        kept, stand_in.grad = stand_in.grad, None
        if kept is not None and local_of(kept).any():
            raise MisconfigurationException(
                f"OptimizerInBackward cannot work here: `{type(module).__name__}.optimizer_zero_grad` leaves "
                f"gradients for the next backward to add to (in batch {batch_idx}), and they are freed in each. "
                "Clear them for every batch, or remove the callback."
            )

    def _detach(self) -> None:
        self._undo.close()
        self._stepper = self._stepping = None


def _save_nothing(trainer: pl.Trainer, exception: BaseException) -> None:
    """Skip what checkpoint callbacks, which come last, do on an exception: of weights that are in part a step on."""
    saving = [
        callback
        for callback in trainer.checkpoint_callbacks
        if is_overridden("on_exception", callback, Callback) and getattr(callback, "save_on_exception", True)
    ]
    for callback in saving:
        _skip_once(callback, "on_exception")
    if saving:
        rank_zero_warn(
            f"No checkpoint is saved on {type(exception).__name__}: it came in the middle of a backward, in which "
            "OptimizerInBackward had stepped some parameters and others not. The newest one saved before it is whole."
        )


def _skip_once(callback: Callback, hook: str) -> None:
    patch = Patches()
    patch.enter_context(replaced(callback, **{hook: lambda *_: patch.close()}))


def _users_callbacks(trainer: pl.Trainer) -> Iterator[Callback]:
    """Those of neither Lightning nor this package, which look at no gradient, or refuse this one by name."""
    known = ("lightning", "pytorch_lightning", __name__.partition(".")[0])
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if type(callback).__module__.partition(".")[0] not in known:
            yield callback


def _find_problem(trainer: pl.Trainer, module: pl.LightningModule) -> str | None:
    """What of the trainer or the module needs all gradients at once, as a sentence, or ``None``."""
    name = type(module).__name__
    if not module.automatic_optimization:
        return (
            f"`{name}` optimizes manually (`automatic_optimization = False`), so only it knows when a gradient is "
            "to be used. Use automatic optimization, or call `step_in_backward` (in `lightning_memopt.techniques."
            "optimizer_in_backward`) yourself."
        )
    if reason := _why_not_under(trainer.strategy):
        return reason
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if any(kind.__name__ in _ACCUMULATING_CALLBACKS for kind in type(callback).__mro__):
            return (
                f"{type(callback).__name__} sums gradients over several backwards, and they are freed in each. Use "
                "one of the two; ActivationCheckpointing saves activations and works with OptimizerInBackward."
            )
    if trainer.accumulate_grad_batches > 1:
        return (
            f"`accumulate_grad_batches={trainer.accumulate_grad_batches}` sums gradients over batches, and they are "
            "freed in each. Set it to 1, and save activations instead (ActivationCheckpointing)."
        )
    if is_overridden("configure_gradient_clipping", module):
        return (
            f"`{name}.configure_gradient_clipping` expects all gradients after the backward, and they are freed in "
            "it. Clip by value with `Trainer(gradient_clip_val=..., gradient_clip_algorithm='value')`."
        )
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value":
        return (
            f"`gradient_clip_val={trainer.gradient_clip_val}` clips by the norm of all gradients, which are never "
            "there together. Clip by value (`gradient_clip_algorithm='value'`), or not at all."
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return (
            f"{type(trainer.precision_plugin).__name__} scales the fp16 loss and must see all gradients before it "
            "knows whether to step. Use bf16, which needs no scaling."
        )
    return None


def _why_not_under(strategy: Strategy) -> str | None:
    if isinstance(strategy, SingleDeviceStrategy):
        return None
    name = type(strategy).__name__
    foreign = (
        "reduces gradients over the devices after they are complete, and each parameter would be stepped before "
        "that. Use `memopt_zero3`, train on one device, or leave OptimizerInBackward out."
    )
    reason = getattr(strategy, "why_not_in_backward", foreign)  # of this package's strategies
    return f"{name} {reason}" if reason else None
