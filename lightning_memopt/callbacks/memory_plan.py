"""The planner inside a run: choose, switch on, and compare with what the first steps take."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_memopt.memory.command import PLANNED
from lightning_memopt.memory.report import format_bytes
from lightning_memopt.memory.track import track_memory
from lightning_memopt.planning.devices import DeviceModel
from lightning_memopt.planning.first_batch import batch_of
from lightning_memopt.planning.plan import Plan, PlanResult, describe_failure, plan
from lightning_memopt.planning.space import Layout
from lightning_memopt.planning.written import result_as_dict
from lightning_memopt.techniques.batches import copied, tensors_in

WRONG_BY = 0.05
"""Relative error of a predicted peak from which on it is planned again."""


class MemoryPlan(Callback):
    """Chooses the techniques with which the module fits a budget, switches them on, and checks the prediction.

    Before training the step is predicted (:func:`~lightning_memopt.plan`), and the fastest choice that fits and that
    does not change the numbers is switched on, as if its callbacks had been given to the trainer. The second
    optimizer step is measured. If the prediction was wrong by more than 5%, this is said, and it is planned once
    more, with the budget corrected by the error.

    The strategy stays the user's: one device or replicas. ``Trainer(strategy="memopt_auto")`` chooses that too.
    ``memory_plan.json`` in the trainer's ``default_root_dir`` holds the plans and what was measured.

    Args:
        budget: Memory of each device, as ``"24GiB"`` or in bytes; ``None`` is what the device has.
        device: As for :func:`~lightning_memopt.plan`; ``None`` for the device of this machine.

    Attributes:
        result: What was planned; ``None`` before ``fit``.
        measured_bytes: The peak of the step that was measured; ``None`` until then.

    Raises:
        MisconfigurationException: At the start of ``fit``: nothing fits (says what would), a strategy that the
            planner does not keep, or callbacks in the trainer that it would choose itself.

    Example:
        >>> trainer = pl.Trainer(callbacks=[MemoryPlan(budget="8GiB")], logger=False)
    """

    def __init__(self, budget: int | str | None = None, *, device: str | DeviceModel | None = None) -> None:
        self.budget = budget
        self.device = device
        self.result: PlanResult | None = None
        self.measured_bytes: int | None = None
        self._planned_for: tuple[weakref.ref[pl.Trainer], weakref.ref[pl.LightningModule]] | None = None
        self._chosen: Plan | None = None
        self._again: Callable[[int], PlanResult] | None = None
        self._added: list[Callback] = []
        self._tracker: track_memory | None = None
        self._steps_before = 0  # the fit, and later the step that is measured

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or getattr(trainer.strategy, "memory_plan", None) is self:  # whose strategy has planned
            return
        if self._planned_for == (weakref.ref(trainer), weakref.ref(pl_module)):
            return
        for callback in self._added:  # of a fit of another module
            if callback in trainer.callbacks:  # type: ignore[attr-defined]
                trainer.callbacks.remove(callback)  # type: ignore[attr-defined]
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy) or getattr(
            trainer.strategy, "splits_module", False
        ):
            raise MisconfigurationException(
                f"MemoryPlan keeps the strategy, and under {type(trainer.strategy).__name__} it cannot tell what a "
                "rank holds. Use Trainer(strategy='memopt_auto'), which chooses the strategy too."
            )

        # Taken once: while the loop iterates over the loader, another pass would begin it again.
        batch = batch_of(trainer.fit_loop._data_source.dataloader(), has_begun=True)

        def again(budget: int | str | None) -> PlanResult:
            return self.make_plan(trainer, pl_module, copied(batch), budget, layouts=[Layout()])

        self._again, self.measured_bytes = again, None
        self.follow(trainer, pl_module, again(self.budget))

    def make_plan(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, budget: int | str | None, **options: Any
    ) -> PlanResult:
        """Plan for what ``trainer`` is about to fit; see :func:`~lightning_memopt.plan` for the options."""
        try:
            return plan(
                module,
                batch,
                budget=budget,
                device=self.device,
                exact=True,
                precision=str(trainer.precision),
                gradient_clip_val=trainer.gradient_clip_val,
                gradient_clip_algorithm=trainer.gradient_clip_algorithm,
                accumulate_grad_batches=trainer.accumulate_grad_batches,
                **options,
            )
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error

    def follow(self, trainer: pl.Trainer, module: pl.LightningModule, result: PlanResult) -> None:
        """Switch on what was chosen; once training runs, in place of what was before.

        Raises:
            MisconfigurationException: Nothing fits, or the trainer has such a callback already.
        """
        self._planned_for = weakref.ref(trainer), weakref.ref(module)
        self.result = result
        if result.best is None:
            raise MisconfigurationException(f"{type(self).__name__}: {describe_failure(result)}.")
        self._chosen = result.best
        callbacks = result.best.callbacks()
        present: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if any(type(other) is type(callback) for other in present):
                raise MisconfigurationException(
                    f"{type(self).__name__} would add {type(callback).__name__}, which the trainer has already. "
                    "Leave it to the plan, or keep yours and leave out the plan."
                )
        self._added = callbacks
        present.extend(callbacks)  # whoever iterates over them, to set them up, comes to these too
        names = ", ".join(type(callback).__name__ for callback in callbacks) or "nothing more"
        rank_zero_info(
            f"Memory plan: {result.best.strategy}, {names}: {format_bytes(result.best.peak_bytes)} of "
            f"{format_bytes(result.budget_bytes)} a device."
        )
        if _is_profiled(trainer):
            rank_zero_warn(
                f"{type(self).__name__} does not measure what a step takes: the trainer has a PyTorchProfiler, and "
                "there can be one. Lightning's SimpleProfiler and AdvancedProfiler stand in no way."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps_before = trainer.global_step

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not in the first step of a fit, resumed or not, which finds no gradients of one before.
        is_due = self.measured_bytes is None and self._tracker is None and trainer.global_step > self._steps_before
        if is_due and not _is_profiled(trainer):
            self._steps_before = trainer.global_step
            self._tracker = track_memory(pl_module, trainer.optimizers, tensors_in(batch))
            self._tracker.__enter__()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._tracker is None or trainer.global_step == self._steps_before:
            return
        tracker, self._tracker = self._tracker, None
        tracker.__exit__(None, None, None)
        self._compare(trainer, pl_module, tracker.report().peak_bytes)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop_tracking()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop_tracking()

    def __getstate__(self) -> dict[str, Any]:
        # Copies of the callback (spawned processes) plan for themselves.
        return {**self.__dict__, "_tracker": None, "_again": None, "_planned_for": None}

    def _stop_tracking(self) -> None:
        if self._tracker is not None:
            self._tracker.__exit__(None, None, None)
            self._tracker = None

    def _compare(self, trainer: pl.Trainer, module: pl.LightningModule, peak_bytes: int) -> None:
        assert self.result is not None and self._chosen is not None
        # Of all ranks: stages of a pipeline differ, and where no group is given its ranks are one.
        everyone = dist.group.WORLD if dist.is_initialized() else None
        peak = torch.tensor(float(peak_bytes), device=trainer.strategy.root_device)
        largest = trainer.strategy.reduce(peak, group=everyone, reduce_op="max")
        self.measured_bytes = int(largest)
        predicted_bytes = self._chosen.peak_bytes - self._chosen.by_category.get("workspace", 0)
        error = predicted_bytes / self.measured_bytes - 1
        self._write(trainer)
        if abs(error) <= WRONG_BY:
            return
        said = (
            f"The memory plan predicted {format_bytes(predicted_bytes)} and a step takes "
            f"{format_bytes(self.measured_bytes)} ({error:+.0%})"
        )
        if self._again is None:
            rank_zero_warn(f"{said}; the strategy that was chosen stays, since it cannot be changed within a run.")
            return
        again, self._again = self._again, None
        result = again(int(self.result.budget_bytes * predicted_bytes / self.measured_bytes))
        if result.best is None or result.best.choice == self._chosen.choice:
            rank_zero_warn(f"{said}; planned again, it stays as it is.")
            return
        rank_zero_warn(f"{said}; planned again.")
        self._switch(trainer, module, result)

    def _switch(self, trainer: pl.Trainer, module: pl.LightningModule, result: PlanResult) -> None:
        present: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in self._added:
            callback.teardown(trainer, module, "fit")
            present.remove(callback)
        self.follow(trainer, module, result)
        for hook in ("setup", "on_fit_start", "on_train_start"):
            for callback in self._added:
                getattr(callback, hook)(trainer, module, *(("fit",) if hook == "setup" else ()))

    def _write(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return  # `fast_dev_run` writes no logs and no checkpoints either
        assert self.result is not None
        folder = Path(trainer.default_root_dir)
        said = result_as_dict(self.result) | {"measured_bytes": self.measured_bytes}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / PLANNED).write_text(json.dumps(said, indent=1), encoding="utf-8")
        except OSError as failure:  # a full or read-only disk must not cost the training
            rank_zero_warn(f"{type(self).__name__} could not write what it planned: {failure}")


def _is_profiled(trainer: pl.Trainer) -> bool:
    """Whether the trainer starts PyTorch's profiler, of which there can be one, for each part of a step."""
    return isinstance(trainer.profiler, PyTorchProfiler)  # type: ignore[attr-defined]
