"""Run a strategy as one rank of many that are not there, so that what it does to memory is predicted by doing it.

A fake process group answers every collective at once and moves nothing (``torch.testing._internal.distributed``;
tried with torch 2.13). The strategies run as they are but for what needs other processes or the values of tensors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel

from lightning_memopt.parallel.mesh import MeshSizes, ParallelMesh
from lightning_memopt.planning.lone_environment import LoneEnvironment
from lightning_memopt.planning.own_chunks import cutting_own_chunks
from lightning_memopt.planning.propagation import unseen_propagation
from lightning_memopt.planning.space import Layout

Value = TypeVar("Value")


@contextmanager
def one_of_many(layout: Layout, stage: int = 0, **options: Any) -> Iterator[Strategy]:
    """Within the block this process is one of the ranks of ``layout``; gives its strategy. For one fit.

    Args:
        layout: The ranks.
        stage: Of the ranks that share a batch by a pipeline, which this is; of the others it is the first.
        **options: Of the strategy.

    Raises:
        ValueError: This process is a rank of a real process group.
    """
    if dist.is_initialized():
        raise ValueError(
            "plan() pretends to be one rank of many, and this process is one of a process group already; plan before "
            "training starts, in a process of its own"
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = layout.sizes.world
    rank = stage * (world // layout.sizes.pipeline)  # the pipeline is the outermost of the mesh's dimensions
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        with cutting_own_chunks(), unseen_propagation():
            yield _pretended(layout, rank, options)
    finally:
        dist.destroy_process_group()
        _forget_the_mesh()


def _forget_the_mesh() -> None:
    """Drop what DTensor remembers of operators: it holds meshes of the fake group, which look like the real ones."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()


def _pretended(layout: Layout, rank: int, options: dict[str, Any]) -> Strategy:
    strategy = layout.make_strategy(
        cluster_environment=LoneEnvironment(layout.sizes.world, rank),
        parallel_devices=[torch.device("cpu")] * layout.sizes.world,
        **options,
    )
    cls = type(strategy)
    strategy.__class__ = type(cls.__name__, (_Pretended, cls), {})
    # The mesh holds real tensors, and is made in real mode.
    vars(strategy)["mesh"] = ParallelMesh("cpu", layout.sizes)
    vars(strategy)["_pretended_sizes"] = layout.sizes
    vars(strategy)["_seen"] = {"training_step"}  # its batch need not be compared with other ranks'
    return strategy


class _Pretended(DDPStrategy):
    """In front of a strategy: leaves out other processes, moves nothing and asks for no values."""

    _pretended_sizes: MeshSizes

    @property
    def sizes(self) -> MeshSizes:
        return self._pretended_sizes

    def _configure_launcher(self) -> None:
        pass

    def setup_environment(self) -> None:
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()

    def setup(self, trainer: "pl.Trainer") -> None:
        this: Any = self
        if this.splits_module:
            this._patch_precision_plugin()
        DDPStrategy.setup(self, trainer)

    def configure_ddp(self) -> None:
        this: Any = self
        if this.splits_module:
            this.parallelize()
        else:
            DDPStrategy.configure_ddp(self)

    def parallelize(self) -> None:
        this: Any = self
        cast(Any, super()).parallelize()
        if getattr(this, "_steps", None) is not None:
            vars(this._steps).update(_check_same_batch=_trust, _from_last_stage=_as_told)

    def _register_ddp_hooks(self) -> None:
        # The reducer cannot take a fake process group's answer for an all-reduce.
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(None, _take_as_reduced)

    def setup_optimizers(self, trainer: "pl.Trainer") -> None:
        Strategy.setup_optimizers(self, trainer)

    def model_to_device(self) -> None:
        pass

    def _check_batch_counts(self, *args: Any) -> None:
        pass

    def _check_same_batch(self, *args: Any) -> None:
        pass

    def _check_replicas(self) -> None:
        pass

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        pass

    def broadcast(self, obj: Value, src: int = 0) -> Value:
        return obj

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision

    def on_exception(self, exception: BaseException) -> None:
        pass

    def teardown(self) -> None:
        this: Any = self
        this._undo_patches.close()


def _trust(*_: Any) -> None:
    """In place of comparing batches, which other ranks are not there for."""


def _as_told(told: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """What the last stage tells of a step: it is that stage, or makes up a loss."""
    output, *others = told()
    return output or {"loss": torch.zeros(()), "extra": {}}, *others


def _take_as_reduced(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
