"""What every strategy of this package does alike: step under the precision plugin, deal out data, fail as one."""

from abc import abstractmethod
from collections.abc import Generator, Hashable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.strategies.fsdp import _move_torchmetrics_to_device
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from torchmetrics import Metric
from typing_extensions import override

from lightning_memopt.models.instance_patch import replaced
from lightning_memopt.models.lazy import refuse_uninitialized
from lightning_memopt.parallel.agreement import (
    broadcast_module_states,
    check_buffers_are_apart,
    check_same_module,
    find_batch_norms,
    gather_values,
    has_hooks,
    separate_elements,
)
from lightning_memopt.parallel.clipping import clip_by_norm, clip_by_value
from lightning_memopt.parallel.gather_batches import gather_batches
from lightning_memopt.parallel.loss_scale import unscale_on_all_ranks
from lightning_memopt.parallel.mesh import MeshSizes, ParallelMesh
from lightning_memopt.parallel.moving import move_in_place
from lightning_memopt.parallel.operators import teach_operators
from lightning_memopt.parallel.refusal import StepRefused, failing_module
from lightning_memopt.parallel.scalars import PlainScalars
from lightning_memopt.strategies.averaging import AverageOfParts, share_averages
from lightning_memopt.strategies.even_batches import EvenBatches, EvenBatchesWithLength
from lightning_memopt.strategies.finetuning import unfreezing_by_identity
from lightning_memopt.strategies.layer_sync import HostSyncBatchNorm
from lightning_memopt.strategies.termination import stopping_together
from lightning_memopt.strategies.watched import WatchedStrategy


class MemoptStrategy(WatchedStrategy):
    """Processes, process groups and devices as Lightning's ``DDPStrategy`` has them; the rest is the subclass's.

    Args:
        **options: ``silent_seconds`` and ``stuck_seconds`` (see
            :class:`~lightning_memopt.strategies.watched.WatchedStrategy`), ``save="full"``, ``"sharded"`` or
            ``"async"`` (see :class:`~lightning_memopt.strategies.saving.SavingStrategy`), and what Lightning's
            ``DDPStrategy`` takes: ``cluster_environment``, ``checkpoint_io``, ``precision_plugin``,
            ``process_group_backend``, ``timeout``, ``start_method``.
    """

    def __init__(self, **options: Any) -> None:
        # Searching for unused parameters costs a walk over the graph per step; not searching hangs or fails at the
        # first module that has one.
        super().__init__(find_unused_parameters=True, gradient_as_bucket_view=True, **options)
        self._undo_patches = ExitStack()
        self._averages: list[AverageOfParts] = []

    # What subclasses say of themselves

    @property
    @abstractmethod
    def sizes(self) -> MeshSizes:
        """How many ways each kind of parallelism divides the ranks; known once the number of ranks is."""

    @property
    def evaluates_together(self) -> bool:
        """Whether ranks wait for each other within evaluation steps too, and so need equally many batches."""
        return self.splits_module

    @property
    def why_not_in_backward(self) -> str | None:
        """Why optimizers cannot step in the backward and what to do, to be put after the strategy's name.

        ``None`` where they can: hooks after the accumulation of a gradient find it reduced over the ranks.
        """
        return None

    def counts(self, parameter: nn.Parameter) -> bool:
        """Whether this rank, of the pipeline stages that hold ``parameter``, is the one that counts it in a norm."""
        return True

    # What strategies do in turn. Each does its part and calls `super()`, so that their product is a class that
    # inherits from them, from the outside in: pipeline, tensor, data.

    def parallelize(self) -> None:
        """Take the module apart: own part first, then what is inside it (``super()``). All ranks together."""
        module = self.lightning_module
        assert module is not None
        if self.splits_module and self.world_size > 1:
            with self.refusals():
                self._averages = share_averages(module.trainer, module, self.reshard, self.state_of)

    def undo(self, gather: bool) -> None:
        """Put the module back as the user wrote it: what is inside first (``super()``), then the own part.

        Args:
            gather: Communicate to make it whole, on all ranks. ``False`` after a failure: where one rank failed the
                others may be anywhere, and communicating would wait for it for ever.
        """
        while self._averages:
            self._averages.pop().undo(gather)

    def reshard(self) -> None:
        """Free what evaluation has gathered of the module, so that it has what this rank holds of it."""

    def run_step(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run the module's ``training_step``, ``validation_step``, ``test_step`` or ``predict_step``."""
        return getattr(self.lightning_module, name)(*args, **kwargs)

    def begin_backward_at(self, tensors: Sequence[torch.Tensor]) -> None:
        """Told of the tensors that leave a step by another way than its return, and at which its backward begins."""

    @contextmanager
    def refusals(self) -> Generator[None, None, None]:
        """Within the block a ``ValueError``, which every rank raises alike, is a refusal by this strategy's name."""
        try:
            yield
        except ValueError as error:
            self.undo(gather=True)  # every rank refuses, so they can gather
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error

    @contextmanager
    def refused_steps(self) -> Generator[None, None, None]:
        """Within the block, which runs a step, only what a strategy refuses is; the user's own errors are theirs."""
        try:
            yield
        except StepRefused as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error

    # What follows from it

    @property
    def data_size(self) -> int:
        """How many different batches a step has: the number of data parallel replicas."""
        return self.sizes.batches

    @property
    def data_rank(self) -> int:
        """Which of those batches is this rank's; ranks that hold parts of one replica have the same."""
        return self.sizes.batch_of(self.global_rank)

    @cached_property
    def mesh(self) -> ParallelMesh:
        """The device mesh of ``sizes``; first asked for in ``setup``, by all ranks together."""
        return ParallelMesh(self.root_device.type, self.sizes)

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The ranks that together have each batch once; ``None`` where that is all of them."""
        return None if self.data_size == self.world_size else self.mesh.batch_group

    # Setting up and taking down

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        self._undo_patches.enter_context(stopping_together(trainer))
        self._keep_samplers(trainer)
        self._monitor_together(trainer)

    @property
    @override
    def root_device(self) -> torch.device:
        # A host has one CPU device, however many ranks; where Ray starts them, `devices="auto"` lists it once.
        devices = self.parallel_devices or []
        return devices[0] if devices and devices[0].type == "cpu" else super().root_device

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.lightning_module is not None
        self._failed = False
        _materialize_distributed_module(self.lightning_module, self.root_device)
        try:
            refuse_uninitialized(self.lightning_module, "it cannot be dealt out to ranks")
            check_same_module(self.lightning_module)
            cuts_parameters = self.splits_module and self.world_size > self.sizes.pipeline
            if cuts_parameters and trainer.state.fn == TrainerFn.FITTING:
                check_buffers_are_apart(self.lightning_module)
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
        separate_elements(self.lightning_module)
        if trainer.state.fn == TrainerFn.FITTING:
            if self.splits_module and self.world_size > 1:
                self._undo_patches.enter_context(unfreezing_by_identity())
            self._warn_of_batch_norm()
            self._sync_batch_norms_of_host()
        if self.splits_module:
            teach_operators()
            self._patch_precision_plugin()
        self._patch_metrics(self.lightning_module)
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING and self.splits_module:
            self.parallelize()
            move_in_place(self.lightning_module, self.root_device)

    @override
    def configure_ddp(self) -> None:
        if not self.splits_module:
            if self.world_size > 1:  # one rank has nobody to exchange gradients with, and buckets take memory
                super().configure_ddp()
            return
        assert self.lightning_module is not None
        for submodule in self.lightning_module.modules():
            if isinstance(submodule, nn.SyncBatchNorm) and submodule.process_group is None:
                submodule.process_group = self.data_group  # only ranks with other batches call it at the same time
        broadcast_module_states(self.lightning_module)
        hooked = [name for name, p in self.lightning_module.named_parameters() if has_hooks(p)]
        self.parallelize()
        for name in hooked:
            if isinstance(self.lightning_module.get_parameter(name), DTensor):
                with self.refusals():
                    raise ValueError(
                        f"`{name}` has a hook of its gradient (`register_hook`), and each rank holds a part of it, "
                        "of which no such hook is called; change gradients in `on_after_backward`, or use "
                        "`memopt_ddp`."
                    )
        move_in_place(self.lightning_module, self.root_device)

    @override
    def model_to_device(self) -> None:
        """Leave what is to be taken apart where it is: parts go to the device as they are made, never the whole."""
        module = self.lightning_module
        assert module is not None
        # Evaluation by itself gives all ranks one module by a function of Lightning's, where it is.
        stays = module.trainer.state.fn == TrainerFn.FITTING or "cpu:" in dist.get_backend_config()
        if not (self.splits_module and stays):
            super().model_to_device()
            return
        _move_torchmetrics_to_device(module, self.root_device)
        _update_properties(module, device=self.root_device)

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        # Loading into the meta device does nothing and says nothing.
        return self.lightning_module is not None and any(p.is_meta for p in self.lightning_module.parameters())

    @override
    def teardown(self) -> None:
        self._undo_patches.close()
        self.undo(gather=not self._failed)
        module = self.lightning_module
        assert module is not None
        # After a failure ranks keep their parts. Those on the meta device cannot be moved to the CPU, nor shards that
        # the error's frames hold, and failing to would take the place of the error.
        stays = replaced(module, cpu=lambda: module) if self._failed and self.splits_module else nullcontext()
        with stays:
            super().teardown()
        self._watch.stop()

    def _patch_precision_plugin(self) -> None:
        """Let gradients be clipped, unscaled and measured as those of one model, whatever the precision plugin is."""
        plugin = self.precision_plugin

        def by_norm(optimizer: Optimizer, clip_val: float) -> None:
            stages = self.mesh.pipeline.get_group() if self.sizes.pipeline > 1 else None
            clip_by_norm(list(plugin.main_params(optimizer)), clip_val, stages=stages, counts=self.counts)

        def by_value(optimizer: Optimizer, clip_val: float) -> None:
            clip_by_value(plugin.main_params(optimizer), clip_val)

        after_closure = plugin._after_closure

        def with_plain_scalars(*args: Any) -> None:
            with PlainScalars():  # of the user's `on_before_optimizer_step` and `configure_gradient_clipping`
                after_closure(*args)

        patches = {"clip_grad_by_norm": by_norm, "clip_grad_by_value": by_value, "_after_closure": with_plain_scalars}
        self._undo_patches.enter_context(replaced(plugin, **patches))
        scaler = getattr(plugin, "scaler", None)
        if scaler is not None:
            self._undo_patches.enter_context(replaced(scaler, _unscale_grads_=unscale_on_all_ranks))

    def _sync_batch_norms_of_host(self) -> None:
        if self.root_device.type != "cpu" or not isinstance(self._layer_sync, TorchSyncBatchNorm):
            return
        self._layer_sync = HostSyncBatchNorm(lambda: self.data_group) if self.data_size > 1 else None

    def _patch_metrics(self, module: nn.Module) -> None:
        """Let metrics of the user's add up over the ranks that have different batches, and no batch twice."""
        if self.data_group is None:
            return
        for metric in module.modules():
            if isinstance(metric, Metric) and metric.process_group is None:
                self._undo_patches.enter_context(replaced(metric, process_group=self.data_group))

    # Steps

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._enter("forward", kwargs.get("batch_idx", args[1] if len(args) > 1 else None))
        with self.precision_plugin.train_step_context():
            return self._run_step("training_step", *args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self._enter("validation", kwargs.get("batch_idx", args[1] if len(args) > 1 else None))
        with self.precision_plugin.val_step_context():
            return self._run_step("validation_step", *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        self._enter("test", kwargs.get("batch_idx", args[1] if len(args) > 1 else None))
        with self.precision_plugin.test_step_context():
            return self._run_step("test_step", *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        self._enter("prediction", kwargs.get("batch_idx", args[1] if len(args) > 1 else None))
        with self.precision_plugin.predict_step_context():
            return self._run_step("predict_step", *args, **kwargs)

    def _run_step(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if not self.splits_module:
            return self.run_step(name, *args, **kwargs)
        # Parameters gathered, or shards made, in inference mode could not be trained with afterwards.
        needs_gradients = torch.is_grad_enabled()  # asked before leaving inference mode, which turns it on
        with torch.inference_mode(False), torch.set_grad_enabled(needs_gradients):
            try:
                output = self.run_step(name, *args, **kwargs)
            except RuntimeError as error:
                if "mixed torch.Tensor and DTensor" not in str(error):
                    raise
                assert self.lightning_module is not None
                raise self._refusal_to_mix(name, failing_module(error, self.lightning_module)) from error
        # torch adds a scalar of shards to a plain loss, and fails in the backward, where the cause cannot be seen.
        if isinstance(output.get("loss") if isinstance(output, Mapping) else output, DTensor):
            raise self._refusal_to_mix(name)
        return output

    def _refusal_to_mix(self, step: str, where: str = "") -> MisconfigurationException:
        place = f", in `{where}`," if where else ""
        return MisconfigurationException(
            f"{type(self).__name__}: `{step}`{place} computes with a parameter outside of the call of its module, "
            "where each rank holds a part of it, and mixes the result with plain tensors. Make it whole first "
            "(`weight.pow(2).sum().full_tensor()`), or use `memopt_ddp`; call blocks, not their `forward`; instead "
            "of a penalty on weights, give the optimizer `weight_decay`."
        )

    def call_through(self, called: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run the module's method ``name`` inside a call of ``called``, so that the hooks of its forward run."""
        module = self.lightning_module
        assert module is not None
        is_users = "forward" in vars(module)
        try:
            return self._forward_redirection(called, module, name, *args, **kwargs)
        finally:
            if not is_users:
                vars(module).pop("forward", None)  # Lightning's redirection leaves the bound method behind

    # What ranks tell each other

    def _monitor_together(self, trainer: pl.Trainer) -> None:
        """Let ``ReduceLROnPlateau`` see one number on all ranks: the mean of what each logged of its own batches.

        Without ``sync_dist=True`` each rank has its own, and would go on with a learning rate of its own.
        """
        loop = trainer.fit_loop.epoch_loop
        own_value = loop._get_monitor_value

        def mean_over_ranks(key: str) -> Any:
            value = own_value(key)
            if value is None or self.world_size == 1:
                return value
            total = value.detach().to(self.root_device, torch.float64)  # in which the mean of equal ones is that one
            dist.all_reduce(total)
            return (total / self.world_size).to(value.dtype if value.is_floating_point() else torch.float32)

        self._undo_patches.enter_context(replaced(loop, _get_monitor_value=mean_over_ranks))

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """As Lightning's, over the ranks with different batches where no group is given: each batch counts once."""
        return super().reduce(tensor, self.data_group if group is None else group, reduce_op)

    @override
    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        """As Lightning's, over the ranks with different batches where no group is given: each batch is there once."""
        # The module's own `all_gather` names all ranks where the user names none.
        if self.data_group is None or group not in (None, dist.group.WORLD):
            return super().all_gather(tensor, group, sync_grads)
        with torch.set_grad_enabled(sync_grads and torch.is_grad_enabled()):
            return gather_batches(tensor, self.data_group)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes)
        return bool(votes == self.world_size) if all else bool(votes)

    # Data

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.data_size, "rank": self.data_rank}

    def _keep_samplers(self, trainer: pl.Trainer) -> None:
        """Let the user's samplers stay where all ranks have the same batches, as on one device.

        Lightning's ``DistributedSampler``, which shuffles in training whatever it replaces, is needed there for
        random order alone, which would be another on each rank.
        """
        connector: Any = trainer._data_connector
        lightning_requires = connector._requires_distributed_sampler

        def requires(dataloader: DataLoader) -> bool:
            sampler = getattr(dataloader.batch_sampler, "sampler", dataloader.sampler)
            return (self.data_size > 1 or isinstance(sampler, RandomSampler)) and lightning_requires(dataloader)

        self._undo_patches.enter_context(replaced(connector, _requires_distributed_sampler=requires))

    @override
    def process_dataloader(self, dataloader: object) -> object:
        dataset = getattr(dataloader, "dataset", None)
        is_stream = isinstance(dataloader, DataLoader) and isinstance(dataset, IterableDataset)
        if self.data_size > 1 and is_stream:
            rank_zero_warn(
                f"{type(dataset).__name__} is an IterableDataset, which Lightning does not split among ranks: unless "
                f"it does so itself, each of the {self.data_size} replicas trains on all of it. Split it by "
                "`torch.distributed.get_rank()` in `__iter__`. An epoch ends with the rank that has fewest batches."
            )
        loader = super().process_dataloader(dataloader)
        has_length = sized_len(loader) is not None
        if self.data_size == 1 or (has_length and not is_stream):
            return loader
        even = EvenBatchesWithLength if has_length else EvenBatches
        return even(loader, self.reduce_boolean_decision, self._waits_for_batches)

    def _waits_for_batches(self) -> bool:
        assert self.lightning_module is not None
        return self.lightning_module.trainer.training or self.evaluates_together

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
                f"`{names[0]}`{more} takes its statistics from the batch of its own rank, so training differs from "
                "one device with the same global batch; `Trainer(sync_batchnorm=True)` normalizes over all ranks."
            )
