"""Weight clustering under Lightning: at the end of a fit, or from a step on with training going on."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_memopt.callbacks.errors import named_errors
from lightning_memopt.callbacks.fit_end import refuse_behind_quantization, validate_if_possible
from lightning_memopt.callbacks.fit_time import HoldingCallback, has_its_layers
from lightning_memopt.callbacks.gradual_pruning import GradualPruning
from lightning_memopt.callbacks.prune_on_fit_end import PruneOnFitEnd
from lightning_memopt.callbacks.timing import time_example
from lightning_memopt.compression.clustering import Clusters, Init, apply_clusters, check_clusters
from lightning_memopt.compression.report import compression_report
from lightning_memopt.compression.schedules import check_step
from lightning_memopt.compression.selection import Weight, WeightFilter
from lightning_memopt.compression.sizes import measure_sizes
from lightning_memopt.models.fake import holds_fakes
from lightning_memopt.models.selectors import Selector


class ClusterWeights(HoldingCallback):
    """Rounds the elements of each weight to ``n`` values of its own, found by k-means.

    In memory nothing changes; on disk each element is an index: 4 bits for 16 values. Zeros (what is pruned) have a
    value of their own and stay where they are at least one element in ``n``, or a callback before this one prunes.
    Which elements share a value takes those bits while training goes on, is saved with the callback's state, and is
    kept after every step: the values train, each by the mean update of its elements.

    Args:
        n: Values of each weight, 2 to 256.
        init: First centroids: ``"kmeans++"``, ``"density"``, ``"linear"`` or ``"random"``.
        begin_step: Optimizer steps before the clusters are found, after which the values train; with
            ``GradualPruning``, from the end of its schedule on, and after it in the list of callbacks. ``None``: when
            training is over.
        include: Only these weights: names, patterns or classes of modules. ``None``: all but embeddings.
        exclude: Not these.
        embeddings: Cluster embeddings, and heads tied to them, too.
        seed: Of what is drawn for first centroids.

    Attributes:
        report: What it did, as a :class:`~lightning_memopt.compression.report.CompressionReport`, with latencies
            where the module has samples as ``example_input_array``, and, where it validates, metrics at the end and
            before: just before, or, of values that train, those of the last validation before they were found (none
            where that is before the first one; a run that is resumed has those of the one that it goes on with);
            ``None`` before the end.

    Raises:
        MisconfigurationException: An argument is out of range or, before the first step, no weight matches, or values
            would train and the strategy shards them, or another callback would prune them after they are found.

    Example:
        >>> trainer = pl.Trainer(callbacks=[ClusterWeights(16)], logger=False)
    """

    _held: Clusters | None

    def __init__(
        self,
        n: int,
        init: Init = "kmeans++",
        *,
        begin_step: int | None = None,
        include: Selector | Sequence[Selector] | None = None,
        exclude: Selector | Sequence[Selector] | None = None,
        embeddings: bool = False,
        seed: int = 0,
    ) -> None:
        with named_errors(self):
            check_clusters(n, init)
            super().__init__(WeightFilter(include, exclude, embeddings), bits=(n - 1).bit_length())
            if begin_step is not None:
                check_step(begin_step, "begin_step")
        self.n, self.init, self.begin_step, self.seed = n, init, begin_step, seed

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self.begin_step is None:
            with named_errors(self):
                refuse_behind_quantization(trainer, self)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        before = callbacks[: callbacks.index(self)]
        self._prunes = any(
            isinstance(callback, GradualPruning) or (isinstance(callback, PruneOnFitEnd) and callback in before)
            for callback in callbacks
        )
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and has_its_layers(pl_module):
            self._refuse_later_zeros(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if not has_its_layers(pl_module):  # by now it has them
            self._refuse_later_zeros(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if holds_fakes(pl_module):
            return
        before = measure_sizes(pl_module, packed=False)
        # The strategy has made the weights whole, and weight averaging, if any, has written them.
        if self._state:
            self._apply_at_end(pl_module)
        else:
            self._metrics_before = validate_if_possible(trainer, pl_module)
            self._find(self._hold(self._select(pl_module).weights))
        metrics_before, metrics_after = self._compare_metrics(trainer, pl_module)
        self.report = compression_report(
            before, pl_module, skipped=self._skipped, metrics_before=metrics_before, metrics_after=metrics_after,
            latency=time_example(trainer, pl_module, pl_module),  # shared values take as long as others
        )  # fmt: skip

    @property
    @override
    def _last_step(self) -> int | None:
        return self.begin_step

    @override
    def _check_parts(self, trainer: pl.Trainer, weights: Sequence[Weight]) -> None:
        parted = [w.name for w in weights if isinstance(w.parameter, DTensor) or w.parameter.is_meta]
        if parted:
            raise ValueError(
                f"{parted[0]!r} is not whole on this rank under {type(trainer.strategy).__name__}, "
                "and a value that trains is the mean over all of its elements. Use begin_step=None, which clusters "
                "when training is over, or a strategy of replicas."
            )

    def _refuse_later_zeros(self, trainer: pl.Trainer, module: nn.Module) -> None:
        """Raise where another callback prunes a weight when it shares values already, which fill its zeros again."""
        if self.begin_step is None:
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        place = callbacks.index(self)
        names = {weight.name for weight in self._select(module).weights}
        for other in callbacks:
            if isinstance(other, GradualPruning) and (end := other.schedule.end_step) > self.begin_step:
                said = f"prunes until step {end}. Give begin_step={end} or more"
            elif isinstance(other, GradualPruning) and callbacks.index(other) > place:
                said = "comes after it in the list of callbacks, and prunes what it left. Put ClusterWeights last"
            elif isinstance(other, PruneOnFitEnd) and other.sets_zeros and callbacks.index(other) < place:
                said = "prunes when training is over. Put it after ClusterWeights, or leave begin_step out"
            else:
                continue
            if shared := names.intersection(other.prunable(module)):
                raise MisconfigurationException(
                    f"ClusterWeights: the values of {min(shared)!r} are found at step {self.begin_step}, and "
                    f"{type(other).__name__} {said}."
                )

    @override
    def _hold(self, weights: Sequence[Weight]) -> Clusters:
        return Clusters(weights)

    @override
    def _advance(self, step: int) -> bool:
        assert self._held is not None and self.begin_step is not None
        if self._held.found or step < self.begin_step:
            return False
        self._find(self._held)
        return True

    def _find(self, clusters: Clusters) -> None:
        clusters.find(self.n, self.init, self.seed, all_zeros=self._prunes)

    @override
    def _apply_to(self, module: nn.Module, state: Mapping[str, Any]) -> None:
        apply_clusters(module, state)

    @override
    def _say_too_short(self, steps: int) -> str:
        return (
            f"training ends after {steps} steps and begin_step is {self.begin_step}: values are found when training "
            "is over, and do not train."
        )
