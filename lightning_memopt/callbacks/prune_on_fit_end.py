"""Prune once, when training is over: by zeros, or for good."""

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_memopt.callbacks.errors import named_errors
from lightning_memopt.callbacks.fit_end import (
    FitEndCallback,
    sends_weights_back,
    validate_if_possible,
)
from lightning_memopt.callbacks.fit_time import has_its_layers
from lightning_memopt.callbacks.reporting import Returned
from lightning_memopt.callbacks.timing import has_example, time_example
from lightning_memopt.compression.choose import Choice, Scope, check_sparsity
from lightning_memopt.compression.first_sizes import first_sizes
from lightning_memopt.compression.graph import require_torch_pruning
from lightning_memopt.compression.masks import Masks, find_sparsity, share_of_zeros
from lightning_memopt.compression.patterns import GROUPS, Elements, Groups
from lightning_memopt.compression.report import compression_report
from lightning_memopt.compression.selection import WeightFilter
from lightning_memopt.compression.sizes import measure_sizes
from lightning_memopt.compression.structured import StructuredPruning, prune_structured
from lightning_memopt.models.copying import copy_module
from lightning_memopt.models.fake import holds_fakes
from lightning_memopt.models.instance_patch import replaced
from lightning_memopt.models.selectors import Selector
from lightning_memopt.planning.first_batch import batch_of
from lightning_memopt.techniques.snapshot import StepSnapshot

EndMethod = Literal["magnitude", "random", "n:m", "structured"]


class PruneOnFitEnd(FitEndCallback):
    """Prunes the module when ``fit`` ends, under any strategy and launcher.

    By then the strategy has made the module whole again, so that every rank prunes the same. Single weights, groups,
    blocks and channels are set to zero: the module keeps its structure and its bytes in memory, and zeros are small
    in a sparse export. ``method="structured"`` removes channels, neurons and heads: everything becomes smaller and
    faster, and the trainer's optimizers with it, so that a fit that follows goes on. To lose less at the same
    sparsity, prune while training goes on (:class:`~lightning_memopt.callbacks.gradual_pruning.GradualPruning`).

    Args:
        amount: Share of zeros among the weights to be pruned, a target: zeros that are there already count. For
            ``"structured"`` the share of each group of channels, neurons and heads that the module had at first; half
            of them are about a quarter of the weights.
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
            :func:`~lightning_memopt.compression.container.load_compressed`; not under ``fast_dev_run``.

    Attributes:
        report: What it did, as a :class:`~lightning_memopt.compression.report.CompressionReport`, with metrics before
            and after where the module validates, and latencies where it has samples as ``example_input_array``;
            ``None`` before.
        refusal: Why the result was refused; empty where it was not.
        pruned: The smaller module, where ``"structured"`` pruned in processes that the strategy spawned or forked:
            their weights no longer fit the module that was given to ``fit``, so that one gets the trained weights,
            whole. ``None`` elsewhere, where that module itself is pruned.

    Raises:
        MisconfigurationException: An argument is unknown or, before the first step is taken, nothing can be pruned
            so, or validation is needed and there is none.

    Example:
        >>> trainer = pl.Trainer(callbacks=[PruneOnFitEnd(0.5, scope="global")], logger=False)
    """

    pruned = Returned[pl.LightningModule | None](None)

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
        self.amount = amount
        self._is_structured = method == "structured"
        self._batch: Any = None
        with named_errors(self):
            super().__init__(max_metric_drop, monitor, mode, export_path)
            self._which = WeightFilter(include, exclude, embeddings)
            check_sparsity(amount)
            self._choice = _choice_of(method, amount, pattern, scope, seed)

    @property
    def sets_zeros(self) -> bool:
        """Whether it sets weights to zero, and removes none."""
        return not self._is_structured

    def prunable(self, module: nn.Module) -> list[str]:
        """Names of the weights of ``module`` that it sets to zero."""
        return [weight.name for weight in self._choice.select(module, self._which, self.amount).weights]

    @override
    def _compressed(self, module: pl.LightningModule) -> bool:
        return bool(first_sizes(module))

    @override
    def _misfit(self, module: pl.LightningModule, state: Mapping[str, Any]) -> str:
        for name, parameter in module.named_parameters():
            other = state.get(name, parameter)
            if other.shape != parameter.shape:
                sizes = f"{list(other.shape)}, and the module, which was made smaller, {list(parameter.shape)}"
                return f"has {name!r} of {sizes}"
        return ""

    @property
    @override
    def _copies(self) -> bool:
        return self._is_structured or super()._copies

    @override
    def _check_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super()._check_fit(trainer, pl_module)
        self._batch = None
        if self._is_structured:
            _check_structured(trainer, pl_module)
        if has_its_layers(pl_module):
            self._check(pl_module)
            if self._is_structured and getattr(trainer.strategy, "splits_module", False):
                self._batch = _first_batch(trainer, pl_module)  # no rank can run its part by itself later
                self._try_structured(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with named_errors(self):
            self._check(pl_module)  # by now the module has all its layers

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._is_structured and self._batch is None and not holds_fakes(pl_module):
            self._batch = move_data_to_device(batch, "cpu")
            if not any(isinstance(parameter, DTensor) or parameter.is_meta for parameter in pl_module.parameters()):
                with named_errors(self):
                    self._try_structured(pl_module, validates=True)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if holds_fakes(pl_module):
            return
        if self._is_structured and self._batch is None:  # training had no step
            self._batch = _first_batch(trainer, pl_module)
        before = measure_sizes(pl_module, packed=False)
        metrics = validate_if_possible(trainer, pl_module)
        # Zeros take as long as what they replace, so that the pruned module tells both times; removing changes it.
        original = copy_module(pl_module) if self._is_structured and has_example(pl_module) else pl_module
        stays_whole = self._is_structured and sends_weights_back(trainer)
        module, optimizers = pl_module, trainer.optimizers
        if stays_whole or self._gate is not None:
            module, optimizers = copy_module(pl_module), []
            module.trainer = trainer
        skipped, sparsity = self._prune(module, optimizers)
        after = validate_if_possible(trainer, module)
        if self._gate is not None:
            self.refusal = self._gate.refusal(metrics, after)
            if self.refusal:
                rank_zero_warn(f"PruneOnFitEnd: {self.refusal}, so the module is left as it is. Prune less.")
            elif not stays_whole:
                self._prune(pl_module, trainer.optimizers)
        if stays_whole and not self.refusal:
            self.pruned = module
        self.report = compression_report(
            before, module, skipped=skipped, eligible_sparsity=sparsity, metrics_before=metrics, metrics_after=after,
            latency=time_example(trainer, original, module),
            export_path=self._export(trainer, module if stays_whole else pl_module),
        )  # fmt: skip

    def _try_structured(self, module: pl.LightningModule, *, validates: bool = False) -> None:
        """Prune a copy in host memory, so that a module that cannot be followed is refused now and not at the end.

        Where it ``validates``, which ranks with parts of the module cannot, the smaller one does so, on one batch.
        """
        trial = copy_module(module).cpu()
        trial.trainer = module.trainer
        random_state = StepSnapshot(trial)
        try:
            failed = self._remove(trial).failed
            if validates:
                _refuse_unvalidated(module.trainer, trial)
        finally:
            random_state.restore()
            del trial, random_state
            gc.collect()  # modules refer to themselves, and a copy is large
        if failed:
            name, reason = next(iter(failed.items()))
            others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
            rank_zero_warn(f"PruneOnFitEnd: {name!r}{others} will stay whole, since {reason}. The report names all.")

    def _check(self, module: nn.Module) -> None:
        if self._is_structured:
            self._which.select(module)
        else:
            self._choice.select(module, self._which, self.amount)

    def _prune(
        self, module: pl.LightningModule, optimizers: Sequence[Optimizer] = ()
    ) -> tuple[Mapping[str, str], float | None]:
        """Prune ``module``, the same whenever its weights are the same; what was skipped, and the share of zeros."""
        if self._is_structured:
            return self._remove(module, optimizers).skipped, None
        selection = self._choice.select(module, self._which, self.amount)
        masks = Masks(selection.weights)
        masks.prune(self.amount, self._choice)
        masks.apply()
        _warn_of_empty(module)
        return selection.skipped, share_of_zeros(module, masks.weights)

    def _remove(self, module: nn.Module, optimizers: Sequence[Optimizer] = ()) -> StructuredPruning:
        return prune_structured(
            module, self.amount, self._run, include=self._which.include, exclude=self._which.exclude,
            optimizers=optimizers,
        )  # fmt: skip

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


def _check_structured(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    require_torch_pruning()
    if not module.automatic_optimization:
        raise ValueError(
            f"method='structured' follows training_step, and that of {type(module).__name__} steps its optimizers "
            "itself (automatic_optimization=False). Use another method, or prune_structured when training is over."
        )


def _refuse_unvalidated(trainer: pl.Trainer, smaller: pl.LightningModule) -> None:
    """Raise where validation, which is not followed, does not run with ``smaller``."""
    try:
        validate_if_possible(trainer, smaller, batches=1)
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(
            f"method='structured' follows training_step, and validation of {type(smaller).__name__} does not run "
            f"with what that makes smaller ({type(error).__name__}: {first_line}). "
            "Exclude the layers whose outputs it reads with others than training_step does."
        ) from error


def _first_batch(trainer: pl.Trainer, module: pl.LightningModule) -> Any:
    """A batch like the first that training will see, in host memory."""
    with isolate_rng():
        batch = module._on_before_batch_transfer(batch_of(trainer.fit_loop._data_source.dataloader()))
        return module._apply_batch_transfer_handler(batch, torch.device("cpu"))


def _choice_of(method: Any, amount: float, pattern: Any, scope: Any, seed: int) -> Choice:
    if method == "saliency":
        raise ValueError(
            "method='saliency' needs gradients, which are gone when training is over. Use 'magnitude', or "
            "GradualPruning, which has them."
        )
    if method not in get_args(EndMethod):
        raise ValueError(f"method={method!r} is none of {', '.join(map(repr, get_args(EndMethod)))}.")
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
