"""Data parallelism for any LightningModule: replicas, or one of the three ZeRO stages."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.overrides.distributed import _register_ddp_comm_hook
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from lightning_memopt.models.instance_patch import replaced
from lightning_memopt.parallel.agreement import has_hooks
from lightning_memopt.parallel.mesh import MeshSizes
from lightning_memopt.parallel.mixed_optimizers import stepping_mixed
from lightning_memopt.parallel.optimizers import check_steps_shards
from lightning_memopt.parallel.sharding import Sharding, ShardStage, shard_module
from lightning_memopt.parallel.units import check_gradients_are_dense
from lightning_memopt.parallel.unreduced import drop_unreduced_gradients
from lightning_memopt.strategies.base import MemoptStrategy
from lightning_memopt.strategies.data_options import check_arguments, compression_hooks, mixed_precision_policy


class DataParallelStrategy(MemoptStrategy):
    """Every rank trains on its own batches; what they hold in common is replicated or sharded.

    The module needs no ``configure_model``, wrap policy or other change: blocks are found, tied weights stay tied.
    After ``fit`` its class, names and values are as on one device, and checkpoints are the plain single-file ones.
    Runs on GPUs (NCCL) and CPUs (gloo).

    Args:
        shard: What is split among the ranks rather than replicated. ``"none"``: nothing (``memopt_ddp``).
            ``"optimizer"``, ``"gradients"``, ``"parameters"``: ZeRO stages 1, 2, 3 (``memopt_zero1`` to
            ``memopt_zero3``); see :mod:`lightning_memopt.parallel.sharding`.
        offload: Keep what is sharded in CPU memory and step the optimizer there (``memopt_zero..._offload``).
        compression: Send gradients as ``"bf16"`` or ``"fp16"``; with ``shard="none"`` only.
        **options: What Lightning's ``DDPStrategy`` takes: ``cluster_environment``, ``checkpoint_io``,
            ``precision_plugin``, ``process_group_backend``, ``timeout``, ``start_method``, and for replicas
            ``ddp_comm_hook``.

    Raises:
        MisconfigurationException: Bad arguments; or, before the first step, a module that cannot be sharded.

    Source:
        Rajbhandari et al. 2019, ZeRO (https://arxiv.org/abs/1910.02054).

    Example:
        >>> strategy = DataParallelStrategy(shard="parameters")
        >>> trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=2)
    """

    def __init__(
        self,
        shard: Literal["none", "optimizer", "gradients", "parameters"] = "none",
        *,
        offload: bool = False,
        compression: Literal["bf16", "fp16"] | None = None,
        **options: Any,
    ) -> None:
        check_arguments(shard, offload, compression, options.get("ddp_comm_hook"))
        super().__init__(**options)
        self.shard = shard
        self.offload = offload
        self.compression = compression
        self._sharding: Sharding | None = None
        self._unused_reported = False
        self._reduced: frozenset[int] = frozenset()  # ids of the parameters whose gradients replicas reduce

    @property
    @override
    def sizes(self) -> MeshSizes:
        return MeshSizes(data=self.world_size) if self.shard == "none" else MeshSizes(shard=self.world_size)

    @property
    @override
    def splits_module(self) -> bool:
        return self.shard != "none"

    @property
    @override
    def why_not_in_backward(self) -> str | None:
        if self.splits_module or self.world_size == 1:
            return super().why_not_in_backward
        return (
            "reduces the gradients of replicas in buckets that hold all of them from one step to the next, so that "
            "freeing one would free no memory. Use `memopt_zero3`, or leave OptimizerInBackward out."
        )

    # Setting up and taking down

    @override
    def parallelize(self) -> None:
        assert self.lightning_module is not None
        is_fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        # Stages 1 and 2 shard what only training has, so evaluation by itself runs on whole modules.
        if self.data_size > 1 and (self.shard == "parameters" or (is_fitting and self.shard != "none")):
            self._shard_module()
        super().parallelize()

    @override
    def configure_ddp(self) -> None:
        super().configure_ddp()
        assert self.lightning_module is not None
        self._reduced = frozenset(id(p) for p in self.lightning_module.parameters() if p.requires_grad)

    def _reduce_what_was_unfrozen(self) -> None:
        """Wrap the module anew: torch's wrapper reduces what could be trained when it was made, and nothing else.

        Replicas of what is trained later would each follow the gradients of their own batches.
        """
        module = self.lightning_module
        assert module is not None
        if any(p.requires_grad and id(p) not in self._reduced for p in module.parameters()):
            self.model = module
            self.configure_ddp()

    @override
    def _register_ddp_hooks(self) -> None:
        # Lightning's own does nothing but on GPUs; hooks run over gloo as well.
        assert isinstance(self.model, torch.nn.parallel.DistributedDataParallel)
        if self.compression is not None:
            self.model.register_comm_hook(None, compression_hooks()[self.compression])
        else:
            _register_ddp_comm_hook(self.model, self._ddp_comm_state, self._ddp_comm_hook, self._ddp_comm_wrapper)

    @override
    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        # The norm of offloaded gradients is summed over ranks in CPU memory, where evaluation finds the module too.
        return f"cpu:gloo,cuda:{backend}" if self.offload and backend == "nccl" else backend

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        if self._sharding is not None:
            for optimizer in self.optimizers:
                with self.refusals():
                    check_steps_shards(optimizer, self.mesh.shards)

    def _shard_module(self) -> None:
        module = self.lightning_module
        assert module is not None
        optimization = module.trainer.fit_loop.epoch_loop.automatic_optimization
        zero_grad = optimization._optimizer_zero_grad

        def zero_all(batch_idx: int, optimizer: Optimizer) -> None:
            zero_grad(batch_idx, optimizer)
            # Of a window that was left before its last batch (a hook ended the epoch, a stream did).
            drop_unreduced_gradients(module)

        self._undo_patches.enter_context(replaced(optimization, _optimizer_zero_grad=zero_all))
        stage: ShardStage = self.shard  # type: ignore[assignment]
        with self.refusals():
            if module.trainer.state.fn == TrainerFn.FITTING:
                check_gradients_are_dense(module)
            self._sharding = shard_module(
                module,
                self.mesh.shards,
                stage,
                several_backwards=not module.automatic_optimization,
                policy=mixed_precision_policy(self.precision_plugin),
                offload=self.offload,
                held_elsewhere=[parameter for parameter in module.parameters() if parameter.is_meta],
            )

    @override
    def undo(self, gather: bool) -> None:
        super().undo(gather)
        if self._sharding is not None:
            self._sharding.undo(gather)
            self._sharding = None

    # Steps

    @property
    @override
    def evaluates_together(self) -> bool:
        return self._sharding is not None  # replicas evaluate without each other, and so do stages 1 and 2

    @override
    def run_step(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run a step of the module through the wrapper's (or the sharded module's) own call."""
        if name == "training_step" and isinstance(self.model, torch.nn.parallel.DistributedDataParallel):
            self._reduce_what_was_unfrozen()
        module, model = self.lightning_module, self.model
        assert module is not None and model is not None
        is_root = self._sharding is not None and module in self._sharding.roots
        if model is module and not is_root:
            return super().run_step(name, *args, **kwargs)
        return self.call_through(model, name, *args, **kwargs)

    @override
    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        with super().block_backward_sync() if self._sharding is None else self._sharding.accumulate():
            yield

    @override
    def begin_backward_at(self, tensors: Sequence[torch.Tensor]) -> None:
        super().begin_backward_at(tensors)
        if self._sharding is not None:
            self._sharding.begin_backward_at(tensors)

    @override
    def post_backward(self, closure_loss: torch.Tensor) -> None:
        super().post_backward(closure_loss)
        if self._sharding is not None:
            try:
                self._sharding.unused.agree()
            except ValueError as error:
                raise MisconfigurationException(f"{type(self).__name__}: {error}") from error

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        with stepping_mixed(optimizer):
            result = super().optimizer_step(optimizer, closure, *args, **kwargs)
        self._report_unused_parameters()
        return result

    @override
    def reshard(self) -> None:
        super().reshard()
        if self._sharding is not None:
            self._sharding.reshard()

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.lightning_module is not None
        for name, parameter in self.lightning_module.named_parameters() if self._sharding is not None else ():
            # Others, after the accumulation of a gradient, are called with this rank's part.
            if isinstance(parameter, DTensor) and parameter._backward_hooks and has_hooks(parameter):
                raise MisconfigurationException(
                    f"{type(self).__name__}: `{name}` was given a hook of its gradient (`register_hook`), and each "
                    "rank holds a part of it, of which no such hook is called; change gradients in "
                    "`on_after_backward`, or use `memopt_ddp`."
                )

    @override
    def on_validation_end(self) -> None:
        super().on_validation_end()
        self.reshard()

    # Checkpoints

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        if self.offload:
            for optimizer in self.optimizers:
                for parameter, state in optimizer.state.items():
                    if isinstance(parameter, DTensor):  # scalars stay where the module is
                        optimizer.state[parameter] = tree_map_only(torch.Tensor, lambda x: x.cpu(), state)

    # What is said

    def _report_unused_parameters(self) -> None:
        module = self.lightning_module
        if self._unused_reported or self.shard != "none" or module is None or not module.automatic_optimization:
            return
        self._unused_reported = True
        unused = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
        if unused:
            rank_zero_warn(
                f"{len(unused)} parameters got no gradient in the first step on any rank and were left alone: "
                f"{', '.join(f'`{name}`' for name in unused[:10])}{', ...' if len(unused) > 10 else ''}."
            )
