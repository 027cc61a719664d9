"""Prune while training goes on, so that what remains can make up for what is gone."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_memopt.callbacks.reporting import ReportingCallback
from lightning_memopt.compression.bits import empty_packed
from lightning_memopt.compression.choose import Choice, Method, Scope
from lightning_memopt.compression.masks import Masks, apply_masks
from lightning_memopt.compression.report import compression_report
from lightning_memopt.compression.schedules import SparsitySchedule, check_schedule
from lightning_memopt.compression.selection import Selection, WeightFilter
from lightning_memopt.compression.sizes import measure_sizes
from lightning_memopt.models.fake import holds_fakes
from lightning_memopt.models.selectors import Selector


class GradualPruning(ReportingCallback):
    """Raises the share of zero weights along a schedule, and keeps what is pruned at zero after every step.

    The targets are absolute: 0.5 is half of the weights, however often it is asked for. What is pruned stays pruned.
    The masks take one bit a weight, lie beside the module and not in its ``state_dict``, and are saved with the
    callback's state: a run that is resumed gives the weights of one that never stopped. Gradients of pruned weights
    are zeroed before clipping, so that they count in no norm.

    Args:
        schedule: ``ConstantSparsity(...)``, ``PolynomialSparsity(...)``, or anything with their properties.
        method: What is pruned first: ``"magnitude"``, ``"saliency"`` (weight times gradient) or ``"random"``.
        pattern: What is pruned together: ``"elements"``, ``"2:4"``, blocks ``"4x1"``, ``"outputs"``, ``"inputs"``.
        scope: ``"layer"`` has each weight at the target, ``"global"`` all together.
        include: Only these weights: names, patterns or classes of modules. ``None``: all but embeddings.
        exclude: Not these.
        embeddings: Prune embeddings, and heads tied to them, too.
        seed: Of ``"random"``.

    Attributes:
        sparsity: The share of zeros among the weights to be pruned; logged as ``"sparsity"``.
        report: What it did, as a :class:`~lightning_memopt.compression.report.CompressionReport`; ``None`` before
            the end.

    Raises:
        MisconfigurationException: An argument is unknown or, before the first step, no weight can be pruned so.

    Example:
        >>> from lightning_memopt import PolynomialSparsity
        >>> schedule = PolynomialSparsity(0.0, 0.8, begin_step=0, end_step=1000)
        >>> trainer = pl.Trainer(callbacks=[GradualPruning(schedule)], logger=False)
    """

    def __init__(
        self,
        schedule: SparsitySchedule,
        method: Method = "magnitude",
        *,
        pattern: Any = "elements",
        scope: Scope = "layer",
        include: Selector | Sequence[Selector] | None = None,
        exclude: Selector | Sequence[Selector] | None = None,
        embeddings: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.sparsity = 0.0
        self._skipped: dict[str, str] = {}
        self._target = 0.0
        self._masks: Masks | None = None
        self._restored: dict[str, torch.Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self._predicted: list[torch.Tensor] = []
        try:
            self._which = WeightFilter(include, exclude, embeddings)
            check_schedule(schedule)
            self._choice = Choice(method, pattern, scope, seed)
            self._choice.pattern.limit(schedule.final_sparsity)
        except ValueError as error:
            raise MisconfigurationException(f"GradualPruning: {error}") from error
        if method == "saliency" and not schedule.begin_step:
            raise MisconfigurationException(
                "GradualPruning: method='saliency' needs gradients, and the schedule prunes before the first step. "
                "Give it a begin_step of 1 or later."
            )

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(which=str(self._which))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._target, self._restored = 0.0, {}  # of a fit before this one; what is resumed is loaded after this
        others = [type(callback).__name__ for callback in trainer.callbacks]  # type: ignore[attr-defined]
        if self._choice.method == "saliency" and "OptimizerInBackward" in others:
            raise MisconfigurationException(
                "GradualPruning: method='saliency' needs gradients, and OptimizerInBackward frees them in the "
                "backward. Use method='magnitude', or leave OptimizerInBackward out."
            )
        if not is_overridden("configure_model", pl_module):
            self._select(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not in `setup`: by now `configure_model` has made the layers, and the strategy has taken them apart.
        selection = self._select(pl_module)
        weights, self._skipped = selection.weights, selection.skipped
        away = [weight.name for weight in weights if weight.parameter.is_meta]
        if away:
            raise MisconfigurationException(
                f"GradualPruning: {away[0]!r} is on another pipeline stage, and targets are of the whole model. Use "
                "a strategy without pipeline stages, or PruneOnFitEnd."
            )
        if holds_fakes(pl_module):
            self._predicted = [empty_packed(weight.parameter, bits=1) for weight in weights]
        else:
            self._masks = Masks(weights)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._masks is None:
            return
        try:
            self._masks.load_state_dict(self._restored)
        except ValueError as error:
            raise MisconfigurationException(f"GradualPruning: {error}") from error
        self.sparsity = self._masks.sparsity
        for optimizer in trainer.optimizers:
            self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._after_step(trainer)))
        self._prune(trainer.global_step)
        self._masks.apply()
        if pl_module.automatic_optimization and trainer.estimated_stepping_batches < self.schedule.end_step:
            rank_zero_warn(
                f"The schedule of GradualPruning ends at step {self.schedule.end_step}, and training after "
                f"{int(trainer.estimated_stepping_batches)}: the model will be pruned to "
                f"{self.schedule.at(int(trainer.estimated_stepping_batches)):.1%} and not to "
                f"{self.schedule.final_sparsity:.1%}."
            )

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._masks is not None:
            self._masks.apply_to_gradients()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0 and self._masks is not None:
            self._masks.apply()  # weight averaging may have written the weights between two epochs

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.log("sparsity", self.sparsity)

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == dataloader_idx == 0 and self._masks is not None:
            self._masks.apply()  # to an average that a callback has put in for validation

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._masks is not None:
            self._masks.apply()
        self._release()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if holds_fakes(pl_module):
            return
        # Not only in `on_train_end`, where weight averaging may come later. The strategy has made the weights whole.
        apply_masks(pl_module, self._restored)
        self.report = compression_report(
            measure_sizes(pl_module, packed=False),
            pl_module,
            skipped=self._skipped,
            eligible_sparsity=self.sparsity,
        )

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"target": self._target, "masks": self._masks.state_dict() if self._masks else self._restored}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._target, self._restored = state_dict["target"], state_dict["masks"]

    def _select(self, module: pl.LightningModule) -> Selection:
        try:
            selection = self._which.select(module)
            self._choice.check(selection.weights, self.schedule.final_sparsity)
        except ValueError as error:
            raise MisconfigurationException(f"GradualPruning: {error}") from error
        return selection

    def _after_step(self, trainer: pl.Trainer) -> None:
        # Within the step, before any other callback sees or saves the weights; Lightning counts it afterwards.
        assert self._masks is not None
        self._prune(trainer.global_step + 1)
        self._masks.apply()

    def _prune(self, step: int) -> None:
        assert self._masks is not None
        target = self.schedule.at(step)
        if target > self._target:
            self._masks.prune(target, self._choice)
            self._target, self.sparsity = target, self._masks.sparsity

    def _release(self) -> None:
        if self._masks is not None:
            self._restored = self._masks.state_dict()  # a checkpoint may yet be saved
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._predicted.clear()
        self._masks = None
