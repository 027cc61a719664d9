"""The product of data, sharded, tensor and pipeline parallelism on one device mesh."""

from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_memopt.parallel.mesh import MeshSizes, resolve_sizes
from lightning_memopt.strategies.data_parallel import DataParallelStrategy
from lightning_memopt.strategies.pipeline import PipelineParallelStrategy
from lightning_memopt.strategies.tensor import TensorParallelStrategy


class HybridStrategy(PipelineParallelStrategy, TensorParallelStrategy, DataParallelStrategy):
    """Every kind of parallelism at once, each over its own dimension of the ranks.

    The pipeline is outermost: its stages may be on different hosts. Within a stage, ranks with different batches
    share or replicate its parameters, and ranks of a tensor group share each of its matrix products.

    Args:
        data: Replicas, each with its own batches; ``-1`` (for one of the sizes) is the rest of the ranks.
        shard: Ranks that share one replica's parameters, gradients and optimizer state, each with its own batches.
        tensor: Ranks that share each matrix product.
        pipeline: Stages that hold the layers.
        **options: What the single strategies take (``plan``, ``schedule``, ``microbatches``, ``split``, ``offload``,
            ...) but ``size`` and ``shard``, and what Lightning's ``DDPStrategy`` takes.

    Raises:
        MisconfigurationException: Sizes whose product is not the number of ranks, with those that are; or what the
            single strategies refuse.

    Example:
        >>> import lightning.pytorch as pl
        >>> strategy = HybridStrategy(pipeline=2, shard=2, tensor=2)
        >>> trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=8)
    """

    def __init__(
        self,
        *,
        data: int = 1,
        shard: int = 1,
        tensor: int = 1,
        pipeline: int = 1,
        **options: Any,
    ) -> None:
        if options.get("loss_parallel") and pipeline != 1:
            raise MisconfigurationException(
                f"HybridStrategy(loss_parallel=True, pipeline={pipeline}) cannot be: a pipeline's schedule runs the "
                "backward itself, outside of what a loss over split logits needs around it; leave it out."
            )
        if options.get("schedule") == "zbv" and (data, shard) != (1, 1):
            raise MisconfigurationException(
                f"HybridStrategy(schedule='zbv', data={data}, shard={shard}) cannot be: it computes gradients of "
                "weights apart from those of activations, and FSDP2 reduces what one backward gives; use '1f1b' or "
                "'interleaved_1f1b', or only `tensor` inside the stages."
            )
        super().__init__(shard="parameters", **options)
        self._given = {"data": data, "shard": shard, "tensor": tensor, "pipeline": pipeline}

    @property
    @override
    def sizes(self) -> MeshSizes:
        try:
            return resolve_sizes(self.world_size, **self._given)
        except ValueError as error:
            raise MisconfigurationException(f"HybridStrategy: {error}") from error
