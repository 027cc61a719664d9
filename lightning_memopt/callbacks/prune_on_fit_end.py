"""Prune once, when training is over."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from typing_extensions import override

from lightning_memopt.compression.choose import Choice, Scope, check_sparsity
from lightning_memopt.compression.masks import Masks, find_sparsity
from lightning_memopt.compression.patterns import GROUPS, Elements, Groups
from lightning_memopt.compression.report import CompressionReport, compression_report
from lightning_memopt.compression.selection import Selection, WeightFilter
from lightning_memopt.compression.sizes import measure_sizes
from lightning_memopt.models.selectors import Selector

EndMethod = Literal["magnitude", "random", "n:m"]


class PruneOnFitEnd(Callback):
    """Sets a share of the weights to zero when ``fit`` ends, under any strategy and launcher.

    By then the strategy has made the module whole again, so that every rank prunes the same. The module keeps its
    structure and its bytes in memory: zeros are small in a sparse export. Biases, norms and, unless asked for,
    embeddings are left alone. To lose less at the same sparsity, prune while training goes on
    (:class:`~lightning_memopt.callbacks.gradual_pruning.GradualPruning`).

    Args:
        amount: Share of zeros among the weights to be pruned, a target: zeros that are there already count.
        method: ``"magnitude"``, ``"random"``, or ``"n:m"``: by magnitude within groups of 4 inputs, or of 8, whatever
            ``amount`` divides (0.5 is 2:4, 0.375 is 5:8).
        pattern: What is pruned together: ``"elements"``, ``"2:4"``, blocks ``"4x1"``, ``"outputs"``, ``"inputs"``.
        scope: ``"layer"`` has each weight at ``amount``, ``"global"`` all together.
        include: Only these weights: names, patterns or classes of modules. ``None``: all but embeddings.
        exclude: Not these.
        embeddings: Prune embeddings, and heads tied to them, too.
        seed: Of ``"random"``.

    Attributes:
        report: What it did, as a :class:`~lightning_memopt.compression.report.CompressionReport`; ``None`` before.

    Raises:
        MisconfigurationException: An argument is unknown or, before the first step, no weight can be pruned so.

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
    ) -> None:
        self.amount = amount
        self.report: CompressionReport | None = None
        try:
            self._which = WeightFilter(include, exclude, embeddings)
            check_sparsity(amount)
            if method == "n:m":
                self._choice = Choice("magnitude", _groups_of(amount) if pattern is None else pattern, scope, seed)
            elif method == "saliency":
                raise ValueError(
                    "method='saliency' needs gradients, which are gone when training is over. Use 'magnitude', or "
                    "GradualPruning, which has them."
                )
            else:
                self._choice = Choice(method, "elements" if pattern is None else pattern, scope, seed)
            self._choice.pattern.limit(amount)
        except ValueError as error:
            raise MisconfigurationException(f"PruneOnFitEnd: {error}") from error

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and not is_overridden("configure_model", pl_module):
            self._select(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._select(pl_module)  # `configure_model` may have made the layers since

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        before, selection = measure_sizes(pl_module, packed=False), self._select(pl_module)
        masks = Masks(selection.weights)
        masks.prune(self.amount, self._choice)
        masks.apply()
        _warn_of_empty(pl_module)
        self.report = compression_report(
            before, pl_module, skipped=selection.skipped, eligible_sparsity=masks.sparsity
        )

    def _select(self, module: nn.Module) -> Selection:
        try:
            selection = self._which.select(module)
            self._choice.check(selection.weights, self.amount)
        except ValueError as error:
            raise MisconfigurationException(f"PruneOnFitEnd: {error}") from error
        return selection


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
