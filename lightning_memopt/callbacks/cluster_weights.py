"""Weight clustering under Lightning: at the end of a fit, or from a step on with training going on."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_memopt.callbacks.reporting import ReportingCallback
from lightning_memopt.compression.bits import empty_packed
from lightning_memopt.compression.clustering import Clusters, Init, apply_clusters, check_clusters
from lightning_memopt.compression.report import compression_report
from lightning_memopt.compression.schedules import check_step
from lightning_memopt.compression.selection import Selection, WeightFilter
from lightning_memopt.compression.sizes import measure_sizes
from lightning_memopt.models.fake import holds_fakes
from lightning_memopt.models.selectors import Selector


class ClusterWeights(ReportingCallback):
    """Rounds the elements of each weight to ``n`` values of its own, found by k-means.

    In memory nothing changes; on disk each element is an index: 4 bits for 16 values. Where a share of a weight is
    zero (pruned), zero is one of the values and stays. Which elements share a value takes those bits while training
    goes on, is saved with the callback's state, and is kept after every step: the values train, each by the mean
    update of its elements.

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
        report: What it did, as a :class:`~lightning_memopt.compression.report.CompressionReport`; ``None`` before.

    Raises:
        MisconfigurationException: An argument is out of range or, before the first step, no weight matches, or values
            would train and the strategy shards them.

    Example:
        >>> trainer = pl.Trainer(callbacks=[ClusterWeights(16)], logger=False)
    """

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
        super().__init__()
        try:
            self._which = WeightFilter(include, exclude, embeddings)
            check_clusters(n, init)
            if begin_step is not None:
                check_step(begin_step, "begin_step")
        except ValueError as error:
            raise MisconfigurationException(f"ClusterWeights: {error}") from error
        self.n, self.init, self.begin_step, self.seed = n, init, begin_step, seed
        self._clusters: Clusters | None = None
        self._state: dict[str, Any] = {}
        self._hooks: list[RemovableHandle] = []
        self._predicted: list[Tensor] = []

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(which=str(self._which))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._state = {}  # of a fit before this one; what is resumed is loaded after this
            if not is_overridden("configure_model", pl_module):
                self._select(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        weights = self._select(pl_module).weights
        if self.begin_step is None:
            return
        if holds_fakes(pl_module):
            bits = (self.n - 1).bit_length()
            self._predicted = [empty_packed(weight.parameter, bits) for weight in weights]
            return
        parted = [w.name for w in weights if isinstance(w.parameter, DTensor) or w.parameter.is_meta]
        if parted:
            raise MisconfigurationException(
                f"ClusterWeights: {parted[0]!r} is not whole on this rank under {type(trainer.strategy).__name__}, "
                "and a value that trains is the mean over all of its elements. Use begin_step=None, which clusters "
                "when training is over, or a strategy of replicas."
            )
        self._clusters = Clusters(weights)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._clusters is None:
            return
        try:
            self._clusters.load_state_dict(self._state)
        except ValueError as error:
            raise MisconfigurationException(f"ClusterWeights: {error}") from error
        for optimizer in trainer.optimizers:
            self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._after(trainer.global_step + 1)))
        if not self._state:
            self._after(trainer.global_step)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if holds_fakes(pl_module):
            return
        # The strategy has made the weights whole, and weight averaging, if any, has written them.
        before, selection = measure_sizes(pl_module, packed=False), self._select(pl_module)
        if self._state:
            apply_clusters(pl_module, self._state)
        else:
            Clusters(selection.weights).find(self.n, self.init, self.seed)
        self.report = compression_report(before, pl_module, skipped=selection.skipped)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"clusters": self._clusters.state_dict() if self._clusters else self._state}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict["clusters"]

    def _select(self, module: pl.LightningModule) -> Selection:
        try:
            return self._which.select(module)
        except ValueError as error:
            raise MisconfigurationException(f"ClusterWeights: {error}") from error

    def _after(self, step: int) -> None:
        assert self._clusters is not None and self.begin_step is not None
        if self._clusters.found:
            self._clusters.apply()
        elif step >= self.begin_step:
            self._clusters.find(self.n, self.init, self.seed)

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._predicted.clear()
        if self._clusters is not None:
            self._state = self._clusters.state_dict()  # a checkpoint may yet be saved
            self._clusters = None
