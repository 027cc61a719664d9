"""What is compressed when training is over: validated before and after, judged, and written to disk."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from typing_extensions import override

from lightning_memopt.callbacks.errors import named_errors
from lightning_memopt.callbacks.reporting import ReportingCallback, Returned
from lightning_memopt.compression.container import save_compressed
from lightning_memopt.compression.container.destination import check_destination, check_types
from lightning_memopt.models.copying import check_copyable
from lightning_memopt.models.fake import holds_fakes
from lightning_memopt.models.instance_patch import Patches, replaced
from lightning_memopt.planning.quiet import quiet_lightning


class FitEndCallback(ReportingCallback):
    """Compresses when training is over; refuses before it begins what would fail then.

    Args:
        max_metric_drop: How much worse ``monitor`` may become; ``None``: it is not judged.
        monitor: The metric that is judged; ``None``: what ``ModelCheckpoint`` monitors.
        mode: ``"max"`` where more of it is better.
        export_path: A folder to write the result to; not under ``fast_dev_run``.

    Attributes:
        refusal: Why the result was refused; empty where it was not.
    """

    refusal = Returned("")

    def __init__(
        self,
        max_metric_drop: float | None,
        monitor: str | None,
        mode: Literal["min", "max"],
        export_path: str | Path | None,
    ) -> None:
        super().__init__()
        self.export_path = export_path
        self._guard = Patches()
        self._gate = None if max_metric_drop is None else Gate(max_metric_drop, monitor, mode)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # `trainer.test(ckpt_path="best")` without a module takes the last one, which may be a compressed one.
        is_guarded = "on_load_checkpoint" in vars(pl_module)
        if stage != "fit" and self._compressed(pl_module) and not is_guarded:
            self._guard.enter_context(replaced(pl_module, on_load_checkpoint=self._checked_load(pl_module)))
        if stage != "fit" or holds_fakes(pl_module):  # what is predicted has no validation, and no end
            return
        self._forget_results()
        with named_errors(self):
            self._check_fit(trainer, pl_module)

    @abstractmethod
    def _compressed(self, module: pl.LightningModule) -> bool:
        """Whether such a callback made ``module`` one that checkpoints from before may not fit."""

    @abstractmethod
    def _misfit(self, module: pl.LightningModule, state: Mapping[str, Any]) -> str:
        """Why ``state`` of a checkpoint does not fit ``module``, so compressed; empty where it does."""

    def _checked_load(self, module: pl.LightningModule) -> Callable[[dict[str, Any]], None]:
        load = module.on_load_checkpoint

        def checked(checkpoint: dict[str, Any]) -> None:
            if said := self._misfit(module, checkpoint.get("state_dict", {})):
                checkpoint.clear()  # the trainer would keep it, and load it in its next run
                raise MisconfigurationException(
                    f"{type(self).__name__}: the checkpoint {said}. Name a module to load it into, made as it was "
                    "for training: `trainer.test(module, ckpt_path=...)`."
                )
            load(checkpoint)

        return checked

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._guard.close()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._guard.close()

    @property
    def _copies(self) -> bool:
        """Whether a copy is made when training is over."""
        return self._gate is not None

    def _check_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise where it could not be done when training is over; for ``setup``, and nobody's name is said yet."""
        refuse_parts_at_end(trainer.strategy)
        refuse_behind_quantization(trainer, self)
        if self._copies:
            check_copyable(pl_module)
        if self._gate is not None:
            self._gate = self._gate.resolved(trainer)
            require_validation(trainer, pl_module)
        if self.export_path is not None:
            check_types(pl_module)
            if trainer.is_global_zero:
                check_destination(self.export_path)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # What will judge when training is over runs once now, on one batch, as far as ranks have the whole module.
        if holds_fakes(pl_module) or getattr(trainer.strategy, "splits_module", False):
            return
        if self._gate is not None:
            with isolate_rng(), named_errors(self):
                self._gate.check(validate_now(trainer, pl_module, batches=1))

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        logged = trainer.callback_metrics
        is_known = logged or not trainer.sanity_checking  # where Lightning leaves out those of several loaders
        if self._gate is not None and trainer.state.fn == TrainerFn.FITTING and is_known:
            with named_errors(self):
                self._gate.check(logged)

    def _export(self, trainer: pl.Trainer, module: pl.LightningModule) -> str | Path | None:
        """Write what was not refused, and return where."""
        # `fast_dev_run` writes nothing anywhere, and one batch must not take the place of what a training exported.
        if self.export_path is None or self.refusal or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        if trainer.is_global_zero:
            save_compressed(module, self.export_path)
        trainer.strategy.barrier(type(self).__name__)
        return self.export_path


def refuse_parts_at_end(strategy: Strategy) -> None:
    """Raise where ranks still hold parts of the module when a fit ends, which those of this package gather before.

    Raises:
        ValueError: ``strategy`` is one of those of Lightning's.
    """
    is_parted = isinstance(strategy, FSDPStrategy | ModelParallelStrategy)
    if is_parted or getattr(strategy, "zero_stage_3", False):  # the latter of DeepSpeed
        raise ValueError(
            f"under {type(strategy).__name__} each rank holds parts of the weights when training is over, and these "
            "cannot be compressed or reported on. Use memopt_zero3, memopt_tp or another strategy that makes the "
            "module whole by then, or compress its checkpoint (lightning-memopt compress)."
        )


def refuse_behind_quantization(trainer: pl.Trainer, callback: Callback) -> None:
    """Raise where ``callback``, which needs plain weights when training is over, would find them packed.

    Where a copy is packed by then, it is warned of: that has not what ``callback`` does.

    Raises:
        MisconfigurationException: A callback before it quantizes the module itself.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for other in callbacks[: callbacks.index(callback)]:
        name = type(other).__name__
        if getattr(other, "inplace", False):
            raise MisconfigurationException(
                f"{name}(inplace=True) comes before it in the list of callbacks, and packs the weights that it would "
                f"change. Put it before {name}."
            )
        if getattr(other, "packs_a_copy", False) and not hasattr(callback, "packs_a_copy"):
            rank_zero_warn(
                f"{type(callback).__name__} comes after {name} in the list of callbacks, which quantizes the weights "
                f"as they are before it. Put it before {name} where one result is to have both."
            )


def sends_weights_back(trainer: pl.Trainer) -> bool:
    """Whether weights travel, when training is over, to a module of another process that has plain ones.

    Launchers that spawn or fork processes have that one load them, and it must have their sizes.
    """
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def validate_now(
    trainer: pl.Trainer, module: pl.LightningModule, *, dataloaders: Any = None, batches: int | None = None
) -> dict[str, float]:
    """Run the validation loop of ``module`` within a fit and return what it logs.

    A trainer of its own runs it, with a logger that keeps nothing and without callbacks and checkpoints, so that
    those of ``trainer``, its metrics, its schedulers and its progress are not touched. ``setup``, ``teardown`` and
    ``prepare_data`` of the module and of its data module are not called again. Under several ranks all must call it;
    each validates its part and the mean is returned.

    Args:
        trainer: The trainer, in ``on_train_start`` or ``on_fit_end``.
        module: Its module, or a copy.
        dataloaders: Other data than that of the trainer's validation.
        batches: At most so many of each dataloader; ``None``: as many as the trainer takes.

    Raises:
        MisconfigurationException: There is nothing to validate with.
    """
    if dataloaders is None:
        require_validation(trainer, module)
    val_loop = trainer.fit_loop.epoch_loop.val_loop
    if dataloaders is None and val_loop._combined_loader is None:
        val_loop.setup_data()  # where no validation has run, nothing has loaded them
    data = loaders_of(val_loop) if dataloaders is None else dataloaders
    device = trainer.strategy.root_device
    source: dict[str, Any] = {"dataloaders": data}
    with ExitStack() as stack:
        stack.enter_context(quiet_lightning())
        stack.enter_context(_lent(module))
        if (datamodule := trainer.datamodule) is not None:  # type: ignore[attr-defined]
            # With it, since it may change batches as they are moved, and the module may read it.
            stack.enter_context(_lent(datamodule, val_dataloader=lambda: data))
            source = {"datamodule": datamodule}
        inner = pl.Trainer(
            accelerator=device.type, devices=1 if device.type == "cpu" else [device.index or 0], logger=DummyLogger(),
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            limit_val_batches=trainer.limit_val_batches if batches is None else batches, inference_mode=False,
            plugins=[copy.copy(trainer.precision_plugin)],
        )  # fmt: skip
        inner.strategy.lr_scheduler_configs = stack.enter_context(_schedulers_kept(trainer))
        inner.validate(module, verbose=False, **source)
        metrics = {name: float(value) for name, value in inner.callback_metrics.items()}
    return _mean_over_ranks(trainer, metrics)


def loaders_of(loop: Any) -> Any:
    """What ``loop`` of a trainer iterates over: loaders one after another, or joined into batches as there."""
    combined: CombinedLoader = loop._combined_loader
    return (
        combined.iterables if combined._mode == "sequential" else CombinedLoader(combined.iterables, combined._mode)
    )


def _mean_over_ranks(trainer: pl.Trainer, metrics: dict[str, float]) -> dict[str, float]:
    if trainer.world_size == 1:
        return metrics
    device = trainer.strategy.root_device
    return {
        name: float(trainer.strategy.reduce(torch.tensor(value, device=device), reduce_op="mean"))
        for name, value in metrics.items()
    }


def last_validation(trainer: pl.Trainer) -> dict[str, float]:
    """What the validation logged that has just ended within a fit, the mean over ranks; all of them call it."""
    results = trainer.fit_loop.epoch_loop.val_loop._results
    logged: dict[str, Any] = {}
    current = results.dataloader_idx  # of which alone they are told
    try:
        for index in {result.meta.dataloader_idx for result in results.values()}:
            results.dataloader_idx = index
            logged |= results.metrics(on_step=False)["callback"]
    finally:
        results.dataloader_idx = current
    return _mean_over_ranks(trainer, {name: float(value) for name, value in logged.items()})


def validate_if_possible(
    trainer: pl.Trainer, module: pl.LightningModule, *, batches: int | None = None
) -> dict[str, float]:
    """The metrics of ``module``, see :func:`validate_now`; none where it is trained without validation."""
    try:
        require_validation(trainer, module)
    except MisconfigurationException:
        return {}
    return validate_now(trainer, module, batches=batches)


def require_validation(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Raise where there is no validation loop to judge by; for ``setup``.

    Raises:
        MisconfigurationException: The module has no ``validation_step``, or no data for it.
    """
    if not is_overridden("validation_step", module):
        raise MisconfigurationException(
            f"{type(module).__name__} has no validation_step, so there is nothing to judge by. Write one that logs "
            "a metric."
        )
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    has_data = source.is_defined() if source.instance is not None else trainer.val_dataloaders is not None
    if not has_data or trainer.limit_val_batches == 0:
        raise MisconfigurationException(
            f"{type(module).__name__} is fitted without validation data, so there is nothing to judge by. Give "
            "fit() val_dataloaders, and leave limit_val_batches above 0."
        )


@contextmanager
def _lent(owned: pl.LightningModule | pl.LightningDataModule, **instead: Any) -> Iterator[None]:
    """Give a module, or its data, to another trainer, with hooks for setting up switched off and others replaced."""
    owner = owned.trainer if isinstance(owned, pl.LightningDataModule) else owned._trainer
    hooks = dict.fromkeys(("setup", "teardown", "prepare_data"), lambda *_, **__: None) | instead
    if isinstance(owned, pl.LightningModule):
        hooks["cpu"] = lambda: owned  # to which the other trainer would move it in the end
    modes = {part: part.training for part in owned.modules()} if isinstance(owned, nn.Module) else {}
    try:
        with replaced(owned, **hooks):
            yield
    finally:
        owned.trainer = owner
        for part, training in modes.items():
            part.training = training


@contextmanager
def _schedulers_kept(trainer: pl.Trainer) -> Iterator[list[Any]]:
    """The schedulers, which a module may step when it has validated; that is undone."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    states = copy.deepcopy([scheduler.state_dict() for scheduler in schedulers])
    settings = copy.deepcopy([{key: value for key, value in group.items() if key != "params"} for group in groups])
    try:
        yield trainer.lr_scheduler_configs
    finally:
        for scheduler, state in zip(schedulers, states, strict=True):
            scheduler.load_state_dict(state)
        for group, setting in zip(groups, settings, strict=True):
            group.update(setting)


def _monitored(callback: Callback) -> Any:
    return getattr(callback, "monitor", None)


@dataclass(frozen=True)
class Gate:
    """How much worse a metric may become.

    Attributes:
        max_drop: In the metric's own units; 0.002 is 0.2 points of an accuracy between 0 and 1.
        monitor: Its name, as ``validation_step`` logs it; ``None``: what ``ModelCheckpoint`` monitors.
        mode: ``"max"`` where larger is better.
    """

    max_drop: float
    monitor: str | None = None
    mode: Literal["min", "max"] = "max"

    def __post_init__(self) -> None:
        is_number = isinstance(self.max_drop, int | float) and not isinstance(self.max_drop, bool)
        if not (is_number and self.max_drop >= 0) or self.mode not in ("min", "max"):
            raise MisconfigurationException(
                f"max_metric_drop={self.max_drop!r} with mode={self.mode!r}: give a drop of at least "
                "0, and 'min' or 'max'."
            )

    def resolved(self, trainer: pl.Trainer) -> "Gate":
        """With the name of a metric.

        Raises:
            MisconfigurationException: Nothing says which, or another callback takes the other way for better.
        """
        if self.monitor is not None:
            self._check_mode(trainer.callbacks)  # type: ignore[attr-defined]
            return self
        for callback in trainer.checkpoint_callbacks:
            if _monitored(callback) is not None:
                return Gate(self.max_drop, callback.monitor, callback.mode)  # type: ignore[attr-defined]
        raise MisconfigurationException(
            "max_metric_drop is given and no metric: name it with monitor= (and mode=), or have a ModelCheckpoint "
            "monitor it."
        )

    def _check_mode(self, callbacks: Sequence[Callback]) -> None:
        """Say where ``mode`` is the wrong one: the gate would take what is worse and refuse what is better."""
        modes = {getattr(each, "mode", None): each for each in callbacks if _monitored(each) == self.monitor}
        other = modes.get({"max": "min", "min": "max"}[self.mode])
        if other is not None:
            raise MisconfigurationException(
                f"monitor={self.monitor!r} is to be judged with mode={self.mode!r}, and {type(other).__name__} "
                "monitors it with the other one. Give the mode that is meant to both."
            )
        if self.mode == "max" and not modes and "loss" in str(self.monitor).lower():
            rank_zero_warn(
                f"monitor={self.monitor!r} is judged with mode='max': a result is refused where it becomes smaller. "
                "Give mode='min' if less of it is better."
            )

    def check(self, logged: Mapping[str, Any]) -> None:
        """Raise where the metric is not among those logged.

        Raises:
            MisconfigurationException: Says which are.
        """
        if self.monitor not in logged:
            raise MisconfigurationException(
                f"monitor={self.monitor!r} is not logged by validation_step, which logs {sorted(logged)}. What "
                "callbacks log does not judge: they are not run when the result is validated."
            )

    def refusal(self, before: Mapping[str, float], after: Mapping[str, float]) -> str:
        """Why the result is refused; empty where it is not.

        Raises:
            MisconfigurationException: The metric is not among those logged.
        """
        for logged in (before, after):
            self.check(logged)
        assert self.monitor is not None
        old, new = before[self.monitor], after[self.monitor]
        drop = old - new if self.mode == "max" else new - old
        if drop <= self.max_drop:  # false for NaN
            return ""
        return f"{self.monitor} went from {old:.6g} to {new:.6g}, and a drop of {self.max_drop:g} is allowed"
