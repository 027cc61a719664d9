"""The planner as a strategy: it chooses one of the others, and callbacks with it."""

from typing import Any

import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lightning_memopt.callbacks.memory_plan import MemoryPlan
from lightning_memopt.planning.devices import DeviceModel
from lightning_memopt.planning.first_batch import batch_of
from lightning_memopt.planning.plan import PlanResult
from lightning_memopt.strategies.data_parallel import DataParallelStrategy


class AutoStrategy(DataParallelStrategy):
    """Plans before the ranks meet, and is from then on the strategy that was chosen.

    Rank 0 predicts one step under each strategy, and with techniques that do not change the numbers
    (:func:`~lightning_memopt.plan`); the fastest that fits is taken, its callbacks are added to the trainer's, and
    the second step is compared with the prediction (:class:`~lightning_memopt.callbacks.memory_plan.MemoryPlan`). For
    that a data module's ``prepare_data`` and ``setup`` run once more on rank 0, and one batch is drawn.

    Args:
        budget: Memory of each device, as ``"24GiB"`` or in bytes; ``None`` is what the device has.
        device: As for :func:`~lightning_memopt.plan`; ``None`` for the device of this machine.
        **options: What Lightning's ``DDPStrategy`` takes.

    Raises:
        MisconfigurationException: At the start of ``fit``: nothing fits; says what would.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(strategy=AutoStrategy("8GiB"), accelerator="cpu", devices=2)
    """

    def __init__(
        self, budget: int | str | None = None, *, device: str | DeviceModel | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.memory_plan = MemoryPlan(budget, device=device)

    @override
    def setup_environment(self) -> None:
        module = self.lightning_module
        assert module is not None
        trainer = module.trainer
        if trainer.state.fn != "fit":
            super().setup_environment()
            return
        told: list[Any] = [None]
        if self.local_rank == 0 and self.node_rank == 0:
            told = [self._plan()]
        super().setup_environment()
        dist.broadcast_object_list(told, src=0)
        result: PlanResult = told[0]
        self.memory_plan.follow(trainer, module, result)
        trainer.callbacks.append(self.memory_plan)  # type: ignore[attr-defined]
        assert result.best is not None
        self._become(result.best.choice.layout.make_strategy() if self.world_size > 1 else DataParallelStrategy())

    def _plan(self) -> PlanResult:
        module = self.lightning_module
        assert module is not None
        trainer = module.trainer
        with isolate_rng():
            if trainer.datamodule is not None:  # type: ignore[attr-defined]
                trainer.datamodule.prepare_data()  # type: ignore[attr-defined]
                trainer.datamodule.setup("fit")  # type: ignore[attr-defined]
            alone = self.num_processes * self.num_nodes == 1
            batch = batch_of(trainer.fit_loop._data_source.dataloader(), has_begun=alone)
        return self.memory_plan.make_plan(
            trainer, module, batch, self.memory_plan.budget, devices=self.num_processes, nodes=self.num_nodes
        )

    def _become(self, chosen: DataParallelStrategy) -> None:
        """Take the class of ``chosen`` and what it has beside what Lightning has set on this one meanwhile."""
        common = vars(DataParallelStrategy()).keys() - {"shard", "offload"}
        vars(self).update({name: value for name, value in vars(chosen).items() if name not in common})
        self.__class__ = type(chosen)  # type: ignore[assignment]
