"""What NCCL asks for and gloo does not: tried over gloo, made to ask for it too."""

from contextlib import suppress
from typing import Any

import lightning.pytorch.loops.utilities as loop_utilities
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

import lightning_memopt as memopt
from lightning_memopt.parallel.pipeline import schedules
from lightning_memopt.parallel.pipeline.schedules import SCHEDULES, Schedule, forward_steps, rank_of_stage
from lightning_memopt.strategies.base import MemoptStrategy
from tests.distributed import run_on_ranks
from tests.strategies.parity import can_split_backward
from tests.strategies.users import MAKE, Net, losses_of, small_loader, trainer_with


class TiesEnds(Net):
    """The first and the last layer have one weight, and there are layers between."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
        self.net[-1].weight = self.net[0].weight

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_groups_of_some_stages_are_made_by_all_ranks_together(monkeypatch: pytest.MonkeyPatch) -> None:
    make = dist.new_group

    def make_by_all(*args: Any, **kwargs: Any) -> Any:
        dist.barrier()  # NCCL splits the communicator of the world, in which all of it takes part
        return make(*args, **kwargs)

    def fit() -> list[float]:
        monkeypatch.setattr(dist, "new_group", make_by_all)
        return losses_of(TiesEnds(), 3, memopt.PipelineParallelStrategy(microbatches=3))

    plain = run_on_ranks(lambda: losses_of(TiesEnds()), 1)[0]
    for losses in run_on_ranks(fit, 3, deadline_seconds=40):
        np.testing.assert_allclose(losses, plain, rtol=1e-5)


class Validates(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", pytest.param("zbv", marks=can_split_backward)])
def test_stages_evaluate_where_what_passes_between_two_ranks_keeps_its_order(
    schedule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = schedules._batch_p2p

    def start_in_order(operations: list[dist.P2POp], **options: Any) -> list[dist.Work]:
        for work in start(operations, **options):  # as on one stream: what is asked for next begins after this
            work.wait()
        return []

    def validate(ranks: int, strategy: Any = "auto") -> float:
        return float(trainer_with(strategy, devices=ranks).validate(Validates(), small_loader())[0]["val_loss"])

    def validate_in_order() -> float:
        monkeypatch.setattr(schedules, "_batch_p2p", start_in_order)
        return validate(2, memopt.PipelineParallelStrategy(schedule, microbatches=4))

    plain = run_on_ranks(lambda: validate(1), 1)[0]
    assert run_on_ranks(validate_in_order, 2, deadline_seconds=40) == pytest.approx([plain] * 2, rel=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_stage_runs_once_on_every_micro_batch_after_the_stage_before_it(schedule: Schedule) -> None:
    steps = forward_steps(schedule, ranks=3, count=5)
    when = {run: time for time, step in enumerate(steps) for run in step.values()}
    assert len(when) == sum(map(len, steps)) == 5 * (1 + max(stage for stage, _ in when))
    assert all(rank_of_stage(schedule, stage, 3) == rank for step in steps for rank, (stage, _) in step.items())
    assert all(when[stage - 1, number] < time for (stage, number), time in when.items() if stage)


class SeesMoves(Validates):
    """Takes down that the whole of it is moved while it is set up."""

    moved = False

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.moved = True
        return super().to(*args, **kwargs)

    def on_fit_start(self) -> None:
        assert not self.moved
        assert self.device == self.trainer.strategy.root_device


@pytest.mark.parametrize("strategy", ["zero3", "tp", "pp"])
def test_no_device_holds_all_of_a_module_before_it_is_taken_apart(strategy: str) -> None:
    run_on_ranks(lambda: trainer_with(MAKE[strategy]()).fit(SeesMoves(), small_loader(), small_loader()), 2)


@pytest.mark.parametrize(
    ("strategy", "averages"),
    [("zero3", True), *((name, False) for name in ("zero3", "tp", "pp")),
     *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("tp", "pp"))],
)  # fmt: skip
def test_evaluation_in_inference_mode_trains_and_validates_as_one_device(
    strategy: str, averages: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(ranks: int, made: Any = "auto") -> dict[str, float]:
        # Lightning evaluates over gloo alone without it.
        monkeypatch.setattr(loop_utilities, "_distributed_is_initialized", lambda: False)
        callbacks = [EMAWeightAveraging(decay=0.8)] if averages else []
        trainer = trainer_with(made, devices=ranks, max_epochs=2, callbacks=callbacks)
        trainer.fit(module := Validates(), small_loader(), small_loader())
        return {**trainer.validate(module, small_loader())[0], "fit": float(trainer.callback_metrics["val_loss"])}

    plain = run_on_ranks(lambda: fit(1), 1)[0]
    for seen in run_on_ranks(lambda: fit(2, MAKE[strategy]()), 2):
        assert seen == pytest.approx(plain, rel=1e-5)


class Normalizes(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(32))

    def on_train_start(self) -> None:
        norm = self.net[1]
        assert isinstance(norm, nn.SyncBatchNorm)
        self.together = dist.get_process_group_ranks(norm.process_group)
        self.trainer.should_stop = True


def test_statistics_are_of_the_ranks_with_other_batches_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoptStrategy, "_sync_batch_norms_of_host", lambda strategy: None)

    def fit(**sizes: int) -> list[int]:
        trainer = trainer_with(memopt.HybridStrategy(**sizes), devices=4, sync_batchnorm=True)
        with suppress(ValueError):  # of torch's: this is for GPUs
            trainer.fit(module := Normalizes(), small_loader())
        return module.together

    assert run_on_ranks(lambda: fit(tensor=2, shard=2), 4) == [[0, 2], [1, 3], [0, 2], [1, 3]]
