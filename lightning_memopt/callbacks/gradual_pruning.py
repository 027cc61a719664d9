"""Prune while training goes on, so that what remains can make up for what is gone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_memopt.callbacks.errors import named_errors
from lightning_memopt.callbacks.fit_time import HoldingCallback
from lightning_memopt.callbacks.reporting import Returned
from lightning_memopt.callbacks.timing import time_example
from lightning_memopt.compression.choose import Choice, Method, Scope
from lightning_memopt.compression.masks import Masks, apply_masks, share_of_zeros
from lightning_memopt.compression.report import compression_report
from lightning_memopt.compression.schedules import SparsitySchedule, check_schedule
from lightning_memopt.compression.selection import Selection, Weight, WeightFilter
from lightning_memopt.compression.sizes import measure_sizes
from lightning_memopt.models.fake import holds_fakes
from lightning_memopt.models.selectors import Selector


class GradualPruning(HoldingCallback):
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
        report: What it did, as a :class:`~lightning_memopt.compression.report.CompressionReport`, with latencies
            where the module has samples as ``example_input_array``, and, where the module validates, its metrics at
            the end and those of the last validation before the first weight was pruned (none where that is before the
            first validation; a run that is resumed has those of the one that it goes on with); ``None`` before the
            end.

    Raises:
        MisconfigurationException: An argument is unknown or, before the first step, no weight can be pruned so.

    Example:
        >>> from lightning_memopt import PolynomialSparsity
        >>> schedule = PolynomialSparsity(0.0, 0.8, begin_step=0, end_step=1000)
        >>> trainer = pl.Trainer(callbacks=[GradualPruning(schedule)], logger=False)
    """

    sparsity = Returned(0.0)
    _held: Masks | None

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
        self.schedule = schedule
        self._target = 0.0
        self._awaits_gradients = False
        self._first_step = 0
        with named_errors(self):
            super().__init__(WeightFilter(include, exclude, embeddings), bits=1)
            check_schedule(schedule)
            self._choice = Choice(method, pattern, scope, seed)
            self._choice.pattern.limit(schedule.final_sparsity)
            if method == "saliency" and not schedule.begin_step:
                raise ValueError(
                    "method='saliency' needs gradients, and the schedule prunes before the first step. Give it a "
                    "begin_step of 1 or later."
                )

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._target = 0.0
        others = [type(callback).__name__ for callback in trainer.callbacks]  # type: ignore[attr-defined]
        if stage == "fit" and self._choice.method == "saliency" and "OptimizerInBackward" in others:
            raise MisconfigurationException(
                "GradualPruning: method='saliency' needs gradients, and OptimizerInBackward frees them in the "
                "backward. Use method='magnitude', or leave OptimizerInBackward out."
            )
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # One optimizer steps all weights that have gradients at once; several may have theirs in turns.
        self._awaits_gradients = self._choice.method == "saliency" and len(trainer.optimizers) == 1
        self._first_step = trainer.global_step
        super().on_train_start(trainer, pl_module)
        if self._held is not None:
            self.sparsity = self._held.sparsity

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A module that steps its optimizers itself clips before their steps are announced.
        if self._held is not None and not pl_module.automatic_optimization:
            self._held.apply_to_gradients()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._held is not None:
            self._held.apply_to_gradients()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.log("sparsity", self.sparsity)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        due = self.schedule.at(trainer.global_step)
        has_stepped = self._held is not None and trainer.global_step > self._first_step
        if self._choice.method == "saliency" and has_stepped and self._target < due:
            rank_zero_warn(
                f"GradualPruning: {due:.1%} were to be pruned, and {self._target:.1%} are, since in no step all "
                "weights had gradients. Use method='magnitude', or one callback for the weights of each optimizer."
            )
        super().on_train_end(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if holds_fakes(pl_module):
            return
        # Not only in `on_train_end`, where weight averaging may come later. The strategy has made the weights whole.
        self._apply_at_end(pl_module)
        metrics_before, metrics_after = self._compare_metrics(trainer, pl_module)
        self.report = compression_report(
            measure_sizes(pl_module, packed=False),
            pl_module,
            skipped=self._skipped,
            eligible_sparsity=share_of_zeros(pl_module, self._names),
            metrics_before=metrics_before,
            metrics_after=metrics_after,
            latency=time_example(trainer, pl_module, pl_module),  # zeros take as long as what they replace
        )

    def prunable(self, module: nn.Module) -> list[str]:
        """Names of the weights of ``module`` that it prunes."""
        return [weight.name for weight in self._choose(module).weights]

    @property
    @override
    def _last_step(self) -> int:
        return self.schedule.end_step

    @override
    def _choose(self, module: nn.Module) -> Selection:
        return self._choice.select(module, self._which, self.schedule.final_sparsity)

    @override
    def _check_parts(self, trainer: pl.Trainer, weights: Sequence[Weight]) -> None:
        away = [weight.name for weight in weights if weight.parameter.is_meta]
        if away:
            raise ValueError(
                f"{away[0]!r} is on another pipeline stage, and targets are of the whole model. Use "
                "a strategy without pipeline stages, or PruneOnFitEnd."
            )

    @override
    def _hold(self, weights: Sequence[Weight]) -> Masks:
        return Masks(weights)

    @override
    def _advance(self, step: int) -> bool:
        assert self._held is not None
        if self._awaits_gradients and step > self._first_step:
            self._awaits_gradients = False
            self._refuse_without_gradient(self._held.weights.values())
        target = self.schedule.at(step)
        if target <= self._target or (self._choice.method == "saliency" and not self._has_gradients):
            return False
        self._held.prune(target, self._choice)
        self._target, self.sparsity = target, self._held.sparsity
        return True

    def _refuse_without_gradient(self, weights: Iterable[Weight]) -> None:
        """Raise in the first step what would be raised in the first that prunes, which may be hours later."""
        missing = [weight.name for weight in weights if weight.parameter.grad is None]
        if missing:
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise MisconfigurationException(
                f"GradualPruning: {missing[0]!r}{others} had no gradient in the first step, which did not use it, so "
                "its saliency is not known. Exclude it, or use method='magnitude'."
            )

    @property
    def _has_gradients(self) -> bool:
        """Whether all weights have: what is due before, as in a run that is resumed, is pruned when they do."""
        assert self._held is not None
        return all(weight.parameter.grad is not None for weight in self._held.weights.values())

    @override
    def _apply_to(self, module: nn.Module, state: Mapping[str, Any]) -> None:
        apply_masks(module, state)

    @override
    def _say_too_short(self, steps: int) -> str:
        return (
            f"the schedule ends at step {self.schedule.end_step}, and training after {steps}: the weights are "
            f"pruned to {self.schedule.at(steps):.1%} and not to {self.schedule.final_sparsity:.1%}."
        )
