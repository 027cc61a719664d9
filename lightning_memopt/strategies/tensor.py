"""Tensor parallelism for any LightningModule: ranks share each matrix product, by a plan that is found."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.tensor.parallel import loss_parallel as loss_parallel_operators
from torch.optim import Optimizer
from typing_extensions import override

from lightning_memopt.parallel.mesh import MeshSizes
from lightning_memopt.parallel.mixed_optimizers import stepping_mixed
from lightning_memopt.parallel.optimizers import check_steps_shards
from lightning_memopt.parallel.tensor.apply import TensorParallel, tensor_parallelize
from lightning_memopt.parallel.tensor.describe import describe_plan
from lightning_memopt.parallel.tensor.loss import losses_of_shards, split_losses
from lightning_memopt.parallel.tensor.plan import find_tensor_plan
from lightning_memopt.parallel.tensor.replicas import check_replicas, have_same_batch, share_random_state
from lightning_memopt.parallel.tensor.sequence import parallelize_sequence
from lightning_memopt.strategies.base import MemoptStrategy


class TensorParallelStrategy(MemoptStrategy):
    """All ranks work on the same batch, each on its part of every large matrix.

    The module needs no plan or other change: pairs of linear layers, attention heads and embeddings are found, and
    what lies between split layers is verified at the first step (:meth:`describe` says what was found). Parameters
    outside the plan are replicated. After ``fit`` the module is as the user wrote it, with whole plain parameters.

    Args:
        size: How many ranks share each product; ``"auto"`` is all of them, and anything less is hybrid.
        plan: ``"auto"``, or patterns of module names with ``"colwise"``, ``"rowwise"`` or ``"whole"`` for those that
            are not to be left to it, as ``{"*.mlp.fc1": "colwise", "head": "whole"}``.
        sequence_parallel: Split norms, residual sums and dropout of transformer blocks by tokens, in training; for
            blocks that hold their split layers in submodules (Llama, GPT-2), refused by name for others.
        loss_parallel: Compute cross-entropies from logits that stay split by class, so that no rank holds those of
            the whole vocabulary; in training, for steps that do nothing else with them.
        **options: What Lightning's ``DDPStrategy`` takes: ``cluster_environment``, ``checkpoint_io``,
            ``precision_plugin``, ``process_group_backend``, ``timeout``, ``start_method``.

    Raises:
        MisconfigurationException: Bad arguments; or, before the first step, a module that cannot be split.

    Source:
        Shoeybi et al. 2019 (https://arxiv.org/abs/1909.08053); Korthikanti et al. 2022
        (https://arxiv.org/abs/2205.05198) for ``sequence_parallel``.

    Example:
        >>> strategy = TensorParallelStrategy(plan={"head": "whole"})
        >>> trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=2)
    """

    def __init__(
        self,
        size: int | Literal["auto"] = "auto",
        plan: Mapping[str, str] | Literal["auto"] = "auto",
        *,
        sequence_parallel: bool = False,
        loss_parallel: bool = False,
        **options: Any,
    ) -> None:
        if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise MisconfigurationException(
                f"TensorParallelStrategy(size={size!r}) is no number of ranks; give 1 or more, or 'auto' for all."
            )
        if plan != "auto" and not isinstance(plan, Mapping):
            raise MisconfigurationException(
                f"TensorParallelStrategy(plan={plan!r}) is no plan; give 'auto', or a dict of module names with "
                "'colwise', 'rowwise' or 'whole', such as {'head': 'whole'}."
            )
        super().__init__(**options)
        self.size = size
        self.plan: dict[str, str] = {} if plan == "auto" else dict(plan)
        self.sequence_parallel = sequence_parallel
        self.loss_parallel = loss_parallel
        self._heads: list[str] = []
        self._split: TensorParallel | None = None
        self._description = ""
        self._seen: set[str] = set()

    @property
    @override
    def sizes(self) -> MeshSizes:
        return MeshSizes(tensor=self.world_size)

    @property
    @override
    def splits_module(self) -> bool:
        return True

    def describe(self) -> str:
        """What is split and how, with bytes per rank, and why a module is whole; once training was set up.

        Raises:
            MisconfigurationException: Before that.
        """
        if self._split is not None:
            return describe_plan(self._split.plan, self._split.regions)
        if not self._description:
            raise MisconfigurationException(
                "TensorParallelStrategy.describe() has nothing to describe yet: the plan is found when `fit`, "
                "`validate`, `test` or `predict` sets up. Call it then (in a hook), or afterwards."
            )
        return self._description

    # Setting up and taking down

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if self.size not in ("auto", self.world_size):
            raise MisconfigurationException(
                f"TensorParallelStrategy(size={self.size}) on {self.world_size} ranks would make several "
                "groups with different batches, which is more than tensor parallelism; use "
                f"HybridStrategy(tensor={self.size}, data=-1), or as many ranks as `size`."
            )
        self._seen.clear()
        super().setup(trainer)

    @override
    def parallelize(self) -> None:
        self._description = "One rank: nothing is split."
        if self.sizes.tensor > 1:
            self._split_module()
            share_random_state(self.mesh.tensor)
        super().parallelize()

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers if self._split is not None else ():
            with self.refusals():
                check_steps_shards(optimizer, self.mesh.tensor)

    def _split_module(self) -> None:
        module = self.lightning_module
        assert module is not None
        with self.refusals():
            plan = find_tensor_plan(module, self.sizes.tensor, self.plan)
            if plan.is_empty:
                raise ValueError(
                    f"{type(module).__name__} has nothing that can be split among {plan.size} ranks; use "
                    f"`memopt_zero3`. What was found:\n{describe_plan(plan)}"
                )
            self._split = tensor_parallelize(module, self.mesh.tensor, plan)
            if self.sequence_parallel:
                parallelize_sequence(self._split, self.mesh.tensor)
            if self.loss_parallel:
                self._heads = split_losses(self._split)

    @override
    def undo(self, gather: bool) -> None:
        super().undo(gather)
        if self._split is not None:
            self._description = self.describe()
            self._split.undo(gather)
            self._split = None
            self._heads = []

    # Steps

    @override
    def run_step(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run a step of the module; before the first of its kind, make sure that all ranks have one batch."""
        if self._split is not None and name not in self._seen:
            self._seen.add(name)
            if not have_same_batch((args, kwargs), self.mesh.tensor):
                raise MisconfigurationException(
                    f"The ranks of a tensor group were given different batches for `{name}`, and they share each "
                    "product, so they need the same. Deal out data by `trainer.strategy.distributed_sampler_kwargs`, "
                    "not by the global rank."
                )
        losses = losses_of_shards(self._heads) if self._heads and name == "training_step" else nullcontext()
        with self.refused_steps(), losses:
            return super().run_step(name, *args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        with loss_parallel_operators() if self._heads else nullcontext():
            return super().backward(closure_loss, optimizer, *args, **kwargs)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        with stepping_mixed(optimizer):
            return super().optimizer_step(optimizer, closure, *args, **kwargs)

    # Replicas

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._check_replicas()

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        self._check_replicas()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self._check_replicas()
        return super().lightning_module_state_dict()

    def _check_replicas(self) -> None:
        if self._split is not None:
            assert self.lightning_module is not None
            check_replicas(self.lightning_module, self.mesh.tensor)
