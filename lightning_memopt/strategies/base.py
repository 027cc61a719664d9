"""What every strategy of this package does alike: step under the precision plugin, deal out data, fail as one."""

from abc import abstractmethod
from collections.abc import Hashable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.nn import Module
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_memopt.parallel.agreement import find_batch_norms, gather_values


class MemoptStrategy(DDPStrategy):
    """Processes, process groups and devices as Lightning's ``DDPStrategy`` has them; the rest is the subclass's.

    Args:
        **options: What Lightning's ``DDPStrategy`` takes: ``cluster_environment``, ``checkpoint_io``,
            ``precision_plugin``, ``process_group_backend``, ``timeout``, ``start_method``.
    """

    def __init__(self, **options: Any) -> None:
        # Searching for unused parameters costs a walk over the graph per step; not searching hangs or fails at the
        # first module that has one.
        super().__init__(find_unused_parameters=True, gradient_as_bucket_view=True, **options)
        self._failed = False

    # What subclasses say of themselves

    @property
    def data_size(self) -> int:
        """How many different batches a step has: the number of data parallel replicas."""
        return self.world_size

    @property
    def data_rank(self) -> int:
        """Which of those batches is this rank's; ranks that hold parts of one replica have the same."""
        return self.global_rank

    @property
    def evaluates_together(self) -> bool:
        """Whether ranks wait for each other within evaluation steps too, and so need equally many batches."""
        return True

    @abstractmethod
    def run_step(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run the module's ``training_step``, ``validation_step``, ``test_step`` or ``predict_step``."""

    @abstractmethod
    def undo(self, gather: bool) -> None:
        """Put the module back as the user wrote it.

        Args:
            gather: Communicate to make it whole, on all ranks. ``False`` after a failure: where one rank failed the
                others may be anywhere, and communicating would wait for it for ever.
        """

    # Setting up and taking down

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.lightning_module is not None
        self._failed = False
        _materialize_distributed_module(self.lightning_module, self.root_device)
        if trainer.state.fn == TrainerFn.FITTING:
            self._warn_of_batch_norm()
        super().setup(trainer)

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        # Loading into the meta device does nothing and says nothing.
        return self.lightning_module is not None and any(p.is_meta for p in self.lightning_module.parameters())

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        self._failed = True

    @override
    def teardown(self) -> None:
        self.undo(gather=not self._failed)
        super().teardown()

    # Steps

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.train_step_context():
            return self.run_step("training_step", *args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.val_step_context():
            return self.run_step("validation_step", *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.test_step_context():
            return self.run_step("test_step", *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.predict_step_context():
            return self.run_step("predict_step", *args, **kwargs)

    def call_through(self, called: Module, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run the module's method ``name`` inside a call of ``called``, so that the hooks of its forward run."""
        module = self.lightning_module
        assert module is not None
        is_users = "forward" in vars(module)
        try:
            return self._forward_redirection(called, module, name, *args, **kwargs)
        finally:
            if not is_users:
                vars(module).pop("forward", None)  # Lightning's redirection leaves the bound method behind

    # Data

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.data_size, "rank": self.data_rank}

    @override
    def process_dataloader(self, dataloader: object) -> object:
        dataset = getattr(dataloader, "dataset", None)
        if self.data_size > 1 and isinstance(dataloader, DataLoader) and isinstance(dataset, IterableDataset):
            rank_zero_warn(
                f"{type(dataset).__name__} is an IterableDataset, which Lightning does not split among ranks: unless "
                f"it does so itself, each of the {self.data_size} replicas trains on all of it. Split it by "
                "`torch.distributed.get_rank()` in `__iter__`, with equally many batches on each rank."
            )
        return super().process_dataloader(dataloader)

    @override
    def on_train_start(self) -> None:
        assert self.lightning_module is not None
        self._check_batch_counts("training", self.lightning_module.trainer.num_training_batches)

    @override
    def on_validation_start(self) -> None:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._check_batch_counts("validation", tuple(counts))

    @override
    def on_test_start(self) -> None:
        assert self.lightning_module is not None
        self._check_batch_counts("test", tuple(self.lightning_module.trainer.num_test_batches))

    @override
    def on_predict_start(self) -> None:
        assert self.lightning_module is not None
        self._check_batch_counts("predict", tuple(self.lightning_module.trainer.num_predict_batches))

    def _check_batch_counts(self, kind: str, count: Hashable) -> None:
        if kind != "training" and not self.evaluates_together:
            return
        counts = gather_values(count)
        if len(set(counts)) > 1:
            option = {"training": "train", "validation": "val"}.get(kind, kind)
            raise MisconfigurationException(
                f"The ranks have {counts} {kind} batches, in the order of ranks: the one with fewest would stop "
                "and the others wait for it for ever. Give each rank equally many (`DistributedSampler` does), or "
                f"set `Trainer(limit_{option}_batches=...)` to the smallest."
            )

    # What is said

    def _warn_of_batch_norm(self) -> None:
        assert self.lightning_module is not None
        names = find_batch_norms(self.lightning_module)
        if names and self.data_size > 1 and self._layer_sync is None:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            rank_zero_warn(
                f"`{names[0]}`{more} normalizes over the batch of its own rank, so training differs from one device "
                "with the same global batch; on GPUs, `Trainer(sync_batchnorm=True)` normalizes over all ranks."
            )
