"""Prune once, when training is over: by zeros, or for good."""

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_memopt.callbacks.fit_end import Gate, copy_module, require_validation, validate_now
from lightning_memopt.callbacks.reporting import ReportingCallback
from lightning_memopt.compression.choose import Choice, Scope, check_sparsity
from lightning_memopt.compression.container import save_compressed
from lightning_memopt.compression.masks import Masks, find_sparsity
from lightning_memopt.compression.patterns import GROUPS, Elements, Groups
from lightning_memopt.compression.report import compression_report
from lightning_memopt.compression.selection import WeightFilter
from lightning_memopt.compression.sizes import measure_sizes
from lightning_memopt.compression.structured import prune_structured
from lightning_memopt.models.fake import holds_fakes
from lightning_memopt.models.instance_patch import replaced
from lightning_memopt.models.selectors import Selector
from lightning_memopt.techniques.snapshot import StepSnapshot

EndMethod = Literal["magnitude", "random", "n:m", "structured"]


class PruneOnFitEnd(ReportingCallback):
    """Prunes the module when ``fit`` ends, under any strategy and launcher.

    By then the strategy has made the module whole again, so that every rank prunes the same. Single weights, groups,
    blocks and channels are set to zero: the module keeps its structure and its bytes in memory, and zeros are small
    in a sparse export. ``method="structured"`` removes channels, neurons and heads: everything becomes smaller and
    faster, and the trainer's optimizers with it, so that a fit that follows goes on. To lose less at the same
    sparsity, prune while training goes on (:class:`~lightning_memopt.callbacks.gradual_pruning.GradualPruning`).

    Args:
        amount: Share of zeros among the weights to be pruned, a target: zeros that are there already count. For
            ``"structured"`` the share of each group of channels, neurons and heads; half of them are about a quarter
            of the weights.
        method: ``"magnitude"``, ``"random"``; ``"n:m"``: by magnitude within groups of 4 inputs, or of 8, whatever
            ``amount`` divides (0.5 is 2:4, 0.375 is 5:8); or ``"structured"`` (the ``prune`` extra), which is tried
            with the first batch on a copy in host memory.
        pattern: What is pruned together: ``"elements"``, ``"2:4"``, blocks ``"4x1"``, ``"outputs"``, ``"inputs"``.
        scope: ``"layer"`` has each weight at ``amount``, ``"global"`` all together; no matter for
            ``"structured"``.
        include: Only these weights: names, patterns or classes of modules. ``None``: all but embeddings.
        exclude: Not these.
        embeddings: Prune embeddings, and heads tied to them, too.
        seed: Of ``"random"``.
        max_metric_drop: Leave the module as it is, with a warning, where ``monitor`` would become worse by more than
            this; tried on a copy.
        monitor: The metric that is judged; ``None``: what ``ModelCheckpoint`` monitors.
        mode: ``"max"`` where more of it is better.
        export_path: A folder to write the result to, for
            :func:`~lightning_memopt.compression.container.load_compressed`.

    Attributes:
        report: What it did, as a :class:`~lightning_memopt.compression.report.CompressionReport`, with metrics before
            and after where the module validates; ``None`` before.
        refusal: Why the result was refused; empty where it was not.

    Raises:
        MisconfigurationException: An argument is unknown or, before the first step is taken, nothing can be pruned
            so, or validation is needed and there is none.

    Example:
        >>> trainer = pl.Trainer(callbacks=[PruneOnFitEnd(0.5, scope="global")], logger=False)
    """

    def __init__(
        self,
        amount: float,
        method: EndMethod = "magnitude",
        *,
        pattern: Any = None,
        scope: Scope = "layer",
        include: Selector | Sequence[Selector] | None = None,
        exclude: Selector | Sequence[Selector] | None = None,
        embeddings: bool = False,
        seed: int = 0,
        max_metric_drop: float | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
        export_path: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.amount = amount
        self.export_path = export_path
        self.refusal = ""
        self._is_structured = method == "structured"
        self._batch: Any = None
        self._gate = None if max_metric_drop is None else Gate(max_metric_drop, monitor, mode)
        try:
            self._which = WeightFilter(include, exclude, embeddings)
            check_sparsity(amount)
            self._choice = _choice_of(method, amount, pattern, scope, seed)
        except ValueError as error:
            raise MisconfigurationException(f"PruneOnFitEnd: {error}") from error

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._batch, self.refusal = None, ""
        if self._is_structured and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise MisconfigurationException(
                "PruneOnFitEnd: the processes that this strategy spawns or forks send weights back to a module of "
                "the old sizes, which method='structured' changes. Use strategy='ddp' (or a memopt one), which "
                "starts the script itself again, or torchrun."
            )
        if self._gate is not None:
            self._gate = self._gate.resolved(trainer)
            require_validation(trainer, pl_module)
        if not is_overridden("configure_model", pl_module):
            self._check(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check(pl_module)  # `configure_model` may have made the layers since

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._is_structured or self._batch is not None or holds_fakes(pl_module):
            return
        self._batch = move_data_to_device(batch, "cpu")
        if any(isinstance(parameter, DTensor) or parameter.is_meta for parameter in pl_module.parameters()):
            return  # in parts, of which none can be run by itself
        trial = copy_module(pl_module).cpu()
        random_state = StepSnapshot(trial)
        try:
            self._prune(trial)
        finally:
            random_state.restore()
            del trial, random_state
            gc.collect()  # modules refer to themselves, and a copy is large

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if holds_fakes(pl_module):
            return
        validates = is_overridden("validation_step", pl_module) and trainer.val_dataloaders is not None
        before = measure_sizes(pl_module, packed=False)
        metrics = validate_now(trainer, pl_module) if validates else {}
        module = pl_module if self._gate is None else copy_module(pl_module)
        skipped, sparsity = self._prune(module, [] if self._gate else trainer.optimizers)
        after = validate_now(trainer, module) if validates else {}
        if self._gate is not None:
            self.refusal = self._gate.refusal(metrics, after)
            if self.refusal:
                rank_zero_warn(f"PruneOnFitEnd: {self.refusal}, so the module is left as it is. Prune less.")
            else:
                self._prune(pl_module, trainer.optimizers)
        exported = self._export(trainer, pl_module)
        self.report = compression_report(
            before, module, skipped=skipped, eligible_sparsity=sparsity, metrics_before=metrics, metrics_after=after,
            export_path=exported,
        )  # fmt: skip

    def _check(self, module: nn.Module) -> None:
        try:
            selection = self._which.select(module)
            if not self._is_structured:
                self._choice.check(selection.weights, self.amount)
        except ValueError as error:
            raise MisconfigurationException(f"PruneOnFitEnd: {error}") from error

    def _prune(
        self, module: pl.LightningModule, optimizers: Sequence[Optimizer] = ()
    ) -> tuple[Mapping[str, str], float | None]:
        """Prune ``module``, the same whenever its weights are the same; what was skipped, and the share of zeros."""
        if self._is_structured:
            try:
                done = prune_structured(
                    module, self.amount, self._run, include=self._which.include, exclude=self._which.exclude,
                    optimizers=optimizers,
                )  # fmt: skip
            except ValueError as error:
                raise MisconfigurationException(f"PruneOnFitEnd: {error}") from error
            return done.skipped, None
        selection = self._which.select(module)
        masks = Masks(selection.weights)
        masks.prune(self.amount, self._choice)
        masks.apply()
        _warn_of_empty(module)
        return selection.skipped, masks.sparsity

    def _run(self, module: nn.Module) -> Any:
        """A training step on the first batch, without what Lightning would log of it."""
        modes = {part: part.training for part in module.modules()}
        module.eval()  # statistics of batches stay
        try:
            with replaced(module, log=_log_nothing, log_dict=_log_nothing), torch.enable_grad():
                return module.training_step(self._batch, 0)  # type: ignore[operator]
        finally:
            for part, training in modes.items():
                part.training = training

    def _export(self, trainer: pl.Trainer, module: nn.Module) -> str | Path | None:
        if self.export_path is None or self.refusal:
            return None
        if trainer.is_global_zero:
            save_compressed(module, self.export_path)
        trainer.strategy.barrier("PruneOnFitEnd")
        return self.export_path


def _choice_of(method: Any, amount: float, pattern: Any, scope: Any, seed: int) -> Choice:
    if method == "saliency":
        raise ValueError(
            "method='saliency' needs gradients, which are gone when training is over. Use 'magnitude', or "
            "GradualPruning, which has them."
        )
    if method == "n:m":
        method, pattern = "magnitude", _groups_of(amount) if pattern is None else pattern
    if method == "structured":
        if pattern is not None:
            raise ValueError(
                f"pattern={pattern!r} says what becomes zero, and method='structured' removes channels and heads for "
                "good. Leave one of the two out."
            )
        method = "magnitude"
    choice = Choice(method, "elements" if pattern is None else pattern, scope, seed)
    choice.pattern.limit(amount)
    return choice


def _log_nothing(*_: Any, **__: Any) -> None:
    """In the place of a module's ``log``, where no loop collects what is logged."""


def _groups_of(amount: float) -> Elements:
    for length in GROUPS:
        kept = length * (1 - amount)
        if kept == round(kept):
            return Groups(round(kept), length)
    raise ValueError(
        f"amount={amount:g} is no number of quarters or eighths, which method='n:m' prunes. Give 0.5 (2:4), 0.75 "
        "(1:4) or the like, or name a pattern."
    )


def _warn_of_empty(module: nn.Module) -> None:
    empty = [name for name, share in find_sparsity(module).items() if share == 1]
    if empty:
        rank_zero_warn(
            f"All of {', '.join(map(repr, empty))} is zero now, and what comes through there is lost. Prune less, or "
            "leave it out with exclude=."
        )
