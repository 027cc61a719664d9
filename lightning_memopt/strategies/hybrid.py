"""The product of data, sharded and tensor parallelism on one device mesh."""

from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_memopt.parallel.mesh import MeshSizes, resolve_sizes
from lightning_memopt.strategies.data_parallel import DataParallelStrategy
from lightning_memopt.strategies.tensor import TensorParallelStrategy


class HybridStrategy(TensorParallelStrategy, DataParallelStrategy):
    """Every kind of parallelism at once, each over its own dimension of the ranks.

    Args:
        data: Replicas, each with its own batches; ``-1`` (for one of the sizes) is the rest of the ranks.
        shard: Ranks that share one replica's parameters, gradients and optimizer state, each with its own batches.
        tensor: Ranks that share each matrix product.
        plan: See :class:`~lightning_memopt.strategies.tensor.TensorParallelStrategy`.
        **options: What Lightning's ``DDPStrategy`` takes: ``cluster_environment``, ``checkpoint_io``,
            ``precision_plugin``, ``process_group_backend``, ``timeout``, ``start_method``.

    Raises:
        MisconfigurationException: Sizes whose product is not the number of ranks, with those that are; or what the
            single strategies refuse.

    Example:
        >>> strategy = HybridStrategy(shard=2, tensor=2)
        >>> trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=4)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        data: int = 1,
        shard: int = 1,
        tensor: int = 1,
        plan: Mapping[str, str] | Literal["auto"] = "auto",
        **options: Any,
    ) -> None:
        super().__init__(plan=plan, shard="parameters", **options)
        self._given = {"data": data, "shard": shard, "tensor": tensor}

    @property
    @override
    def sizes(self) -> MeshSizes:
        try:
            return resolve_sizes(self.world_size, **self._given)
        except ValueError as error:
            raise MisconfigurationException(f"HybridStrategy: {error}") from error
