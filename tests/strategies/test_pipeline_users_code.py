"""What users write in the steps of a module works in a pipeline as on one device, or is refused."""

import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

import lightning_memopt as memopt
from tests.distributed import run_on_ranks
from tests.parity import train
from tests.strategies.parity import can_split_backward
from tests.strategies.users import MAKE, Checkpoints, Net, losses_of, small_loader, trainer_with


class StopsInStep(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1:
            self.trainer.should_stop = True
        return loss


class StopsInValidation(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])
        self.trainer.should_stop = not self.trainer.sanity_checking


@pytest.mark.parametrize("module", [StopsInStep, StopsInValidation])
def test_a_step_that_stops_the_trainer_stops_every_stage_after_the_batch(module: type[Net]) -> None:
    def fit() -> tuple[int, int]:
        trainer = trainer_with(MAKE["pp"](), max_epochs=5)
        trainer.fit(module(), small_loader(), small_loader(1) if module is StopsInValidation else None)
        return trainer.global_step, trainer.current_epoch

    steps = 2 if module is StopsInStep else 4
    assert run_on_ranks(fit, 2, deadline_seconds=30) == [(steps, 1)] * 2


@pytest.mark.parametrize(
    ("schedule", "together"),
    [("1f1b", 1), ("interleaved_1f1b", 3), pytest.param("zbv", 2, marks=can_split_backward)],
)
def test_blocks_that_the_step_recomputes_by_itself_train_as_on_one_device(schedule: Any, together: int) -> None:
    def fit() -> list[float]:
        strategy = memopt.PipelineParallelStrategy(schedule, microbatches=4)
        return losses_of(Checkpoints(together=together), 2, strategy)

    plain = run_on_ranks(lambda: losses_of(Checkpoints(together=together)), 1)[0]
    for losses in run_on_ranks(fit, 2, deadline_seconds=30):
        np.testing.assert_allclose(losses, plain, rtol=1e-5)


def test_blocks_recomputed_in_the_reentrant_way_are_refused_by_name() -> None:
    def fit() -> None:
        with pytest.raises(MisconfigurationException, match=r"`blocks.0` is called by .*use_reentrant=False"):
            losses_of(Checkpoints(use_reentrant=True), 2, MAKE["pp"]())

    run_on_ranks(fit, 2, deadline_seconds=30)


class WritesInPlace(nn.Module):
    """A block that writes into what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden += 1
        return self.layer(torch.relu_(hidden))


class InPlaceNet(Net):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 16), *(WritesInPlace() for _ in range(4)))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", pytest.param("zbv", marks=can_split_backward)])
def test_blocks_may_write_into_what_another_stage_sent(schedule: Any) -> None:
    def fit() -> list[float]:
        return losses_of(InPlaceNet(), 2, memopt.PipelineParallelStrategy(schedule, microbatches=4))

    plain = run_on_ranks(lambda: losses_of(InPlaceNet()), 1)[0]
    for losses in run_on_ranks(fit, 2, deadline_seconds=30):
        np.testing.assert_allclose(losses, plain, rtol=1e-5)


COLLECTED: list[torch.Tensor] = []


class CollectsByHooks(pl.LightningModule):
    """Has hooks that collect what blocks return, for its loss, as models do that give hidden states."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4))
        for block in self.blocks:
            block.register_forward_hook(lambda block, args, output: COLLECTED.append(output))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        COLLECTED.clear()
        hidden = batch[0]
        for block in self.blocks:
            hidden = block(hidden)
        return F.cross_entropy(hidden + 2 * COLLECTED[1], batch[1])

    configure_optimizers = Net.configure_optimizers


def test_hooks_of_blocks_of_earlier_stages_see_each_call() -> None:
    def fit() -> list[float]:
        strategy = memopt.PipelineParallelStrategy(microbatches=2, split=["blocks.2"])
        return losses_of(CollectsByHooks(), 2, strategy)

    plain = run_on_ranks(lambda: losses_of(CollectsByHooks()), 1)[0]
    for losses in run_on_ranks(fit, 2, deadline_seconds=30):
        np.testing.assert_allclose(losses, plain, rtol=1e-5)


class Gated(nn.Module):
    """A block that keeps what its gate returns, for the loss to read."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 4)
        self.layer = nn.Linear(32, 32)
        self.kept: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.kept = self.gate(hidden)
        return hidden + torch.tanh(self.layer(hidden)) * self.kept.softmax(-1).max(-1, keepdim=True).values


class PassesBlocksBy(pl.LightningModule):
    """Adds what it computed before blocks behind them, and to its loss what blocks kept."""

    def __init__(self, recomputes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recomputes = recomputes
        self.inlet, self.outlet = nn.Linear(16, 32), nn.Linear(32, 4)
        self.down = nn.ModuleList(Gated() for _ in range(3))
        self.up = nn.ModuleList(Gated() for _ in range(3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hidden = self.inlet(batch[0])
        passed = []
        for block in self.down:
            hidden = checkpoint(block, hidden, use_reentrant=False) if self.recomputes else block(hidden)
            passed.append(torch.sin(hidden))

        def rise(hidden: torch.Tensor) -> torch.Tensor:
            for block, beside in zip(self.up, reversed(passed), strict=True):
                hidden = block(hidden * beside)
            return hidden

        hidden = checkpoint(rise, hidden, use_reentrant=False) if self.recomputes else rise(hidden)
        balance = sum(block.kept.logsumexp(-1).mean() for block in (*self.down, *self.up))
        return F.cross_entropy(self.outlet(hidden), batch[1]) + 0.1 * balance

    configure_optimizers = Net.configure_optimizers


@pytest.mark.parametrize(
    ("schedule", "ranks", "recomputes"),
    [
        ("1f1b", 3, False),
        ("1f1b", 2, True),
        ("interleaved_1f1b", 2, False),
        pytest.param("zbv", 2, False, marks=can_split_backward),
    ],
)
def test_what_passes_blocks_by_is_sent_along_and_has_gradients(schedule: Any, ranks: int, recomputes: bool) -> None:
    def fit() -> list[float]:
        strategy = memopt.PipelineParallelStrategy(schedule, microbatches=4)
        return losses_of(PassesBlocksBy(recomputes), ranks, strategy)

    plain = run_on_ranks(lambda: losses_of(PassesBlocksBy(recomputes)), 1)[0]
    for losses in run_on_ranks(fit, ranks, deadline_seconds=60):
        np.testing.assert_allclose(losses, plain, rtol=1e-5)


def test_what_passes_blocks_by_is_sent_where_blocks_are_checkpointed() -> None:
    def fit(*arguments: Any) -> list[float]:
        return losses_of(PassesBlocksBy(False), *arguments, callbacks=[memopt.ActivationCheckpointing()])

    plain = run_on_ranks(lambda: losses_of(PassesBlocksBy(False)), 1)[0]
    for losses in run_on_ranks(lambda: fit(2, MAKE["pp"]()), 2, deadline_seconds=60):
        np.testing.assert_allclose(losses, plain, rtol=1e-5)


class RaisesInValidation(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        raise ValueError("no such label")


class RaisesBetweenLayers(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise ValueError(f"width is {self.net[0](batch[0]).shape[1]}")


def test_an_error_of_the_users_own_comes_out_of_a_pipeline_as_it_was() -> None:
    def fit() -> None:
        with pytest.raises(ValueError, match=r"^no such label$"):
            trainer_with(MAKE["pp"](), num_sanity_val_steps=0).fit(
                RaisesInValidation(), small_loader(), small_loader(1)
            )
        with pytest.raises(ValueError, match=r"^width is 32$"):
            trainer_with(MAKE["pp"]()).fit(RaisesBetweenLayers(), small_loader())

    run_on_ranks(fit, 2)


class ReadsPairs(Net):
    """Has batches of which not all tensors have one row a sample."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[:2], batch_idx) * batch[2].mean()


def _pairs(samples: list[Any]) -> Any:
    return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples]), torch.ones(3)


def test_batches_that_cannot_be_cut_are_refused_with_what_to_do_and_are_left_whole_as_one_micro_batch() -> None:
    loader = DataLoader(small_loader().dataset, batch_size=8, collate_fn=_pairs)

    def fit() -> list[float]:
        with pytest.raises(MisconfigurationException, match=r"disagree on .*collate_fn.*microbatches=1") as refused:
            trainer_with("memopt_pp").fit(ReadsPairs(), loader)
        assert "split=" not in str(refused.value)
        options = {"strategy": memopt.PipelineParallelStrategy(microbatches=1), "use_distributed_sampler": False}
        return train(ReadsPairs(), loader, steps=4, devices=2, **options).losses

    plain = run_on_ranks(lambda: train(ReadsPairs(), loader, steps=4).losses, 1)[0]
    for losses in run_on_ranks(fit, 2):
        np.testing.assert_allclose(losses, plain, rtol=1e-5)


class MovesInHook(Net):
    """Gets its batches by name from the hook before they are moved."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"x": batch[0] * 2, "y": batch[1]}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch["x"], batch["y"]), batch_idx)


def test_the_batch_that_a_pipeline_is_cut_by_has_been_through_the_hooks_and_the_precision_of_the_trainer() -> None:
    def fit(*arguments: Any) -> list[float]:
        return losses_of(MovesInHook(), *arguments, precision="64-true")

    plain = run_on_ranks(fit, 1)[0]
    for losses in run_on_ranks(lambda: fit(2, MAKE["pp"]()), 2):
        np.testing.assert_allclose(losses, plain, rtol=1e-5)


class Once(IterableDataset):
    """A stream that can be read once."""

    def __init__(self, samples: int, has_length: bool) -> None:
        dataset = small_loader(samples // 8).dataset
        self.rows = iter([dataset[index] for index in range(samples)])
        if has_length:
            self.__class__ = type("SizedOnce", (Once,), {"__len__": lambda _: samples})

    def __iter__(self) -> Any:
        return self.rows


class SeesSums(Net):
    """Takes its batches apart, as steps do."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[float] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.sums.append(float(batch["x"].sum()))

    on_test_batch_start = on_train_batch_start

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch["x"], batch.pop("y")), batch_idx)

    test_step = training_step


def _as_dict(samples: list[Any]) -> dict[str, Any]:
    return {"x": torch.stack([x for x, _ in samples]), "y": torch.stack([y for _, y in samples])}


@pytest.mark.parametrize(("schedule", "has_length"), [("1f1b", False), ("interleaved_1f1b", True)])
def test_a_pipeline_loses_nothing_of_a_stream_that_can_be_read_once(schedule: Any, has_length: bool) -> None:
    def stream() -> DataLoader:
        return DataLoader(Once(32, has_length), batch_size=8, collate_fn=_as_dict)

    def run(ranks: int, make: Callable[[], Any]) -> tuple[list[float], list[float]]:
        fitted, tested = SeesSums(), SeesSums()
        trainer_with(make(), devices=ranks).fit(fitted, stream())
        trainer_with(make(), devices=ranks).test(tested, stream(), verbose=False)
        return fitted.sums, tested.sums

    plain = run_on_ranks(lambda: run(1, lambda: "auto"), 1)[0]
    assert [len(sums) for sums in plain] == [4, 4]
    make = partial(memopt.PipelineParallelStrategy, schedule)
    assert run_on_ranks(lambda: run(2, make), 2, deadline_seconds=30) == [plain, plain]


class ReadsOnItsWay(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*self.net[:-1], nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.net[:3](x)
        return self.net[3:](hidden * (1 if hidden.abs().sum() > 0 else 2))


def test_a_step_that_reads_values_before_most_of_its_layers_is_warned_of_and_trains_as_on_one_device() -> None:
    def fit(*arguments: Any) -> tuple[list[float], list[str]]:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            losses = losses_of(ReadsOnItsWay(), *arguments)
        return losses, [str(warning.message) for warning in warned if "reads values" in str(warning.message)]

    ((plain, _),) = run_on_ranks(fit, 1)
    (losses, said), (others, _) = run_on_ranks(lambda: fit(2, MAKE["pp"]()), 2)
    assert losses == others == pytest.approx(plain, rel=1e-4)
    assert re.search(r"behind `net.2` \(.*\), .*: 68% of the parameters are on the last", said[0])


class LogsEarlyValue(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("norm", self.net[0].weight.norm())
        return super().training_step(batch, batch_idx)


class KeepsEarlyValue(Net):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[torch.Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.kept.append(self.net[0](batch[0]))
        return F.cross_entropy(self.net[1:](self.kept[-1]), batch[1])


class ReturnsEarlyValue(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        norm = self.net[0].weight.norm()
        return {"loss": super().training_step(batch, batch_idx), "norm": norm}


class WaitsInStep(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.trainer.strategy.barrier()
        return loss


class ReducesInStep(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        dist.all_reduce(loss.detach().clone())
        return loss


class ReducesOfBatch(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        dist.all_reduce(batch[0].mean())
        return super().training_step(batch, batch_idx)


class DrawsBatches(Net):
    def training_step(self, dataloader_iter: Any) -> Any:
        return super().training_step(*next(dataloader_iter)[:2])


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (WaitsInStep, "the step calls `strategy.barrier`, in which all ranks wait"),
        (ReducesInStep, "the step calls `torch.distributed`, in which all ranks wait"),
        (ReducesOfBatch, "the step calls `torch.distributed`, in which all ranks wait"),
        (DrawsBatches, r"`DrawsBatches.training_step\(dataloader_iter\)` draws its batches itself"),
        (LogsEarlyValue, "`norm` is logged from a value that is computed before"),
        (KeepsEarlyValue, "appends to `kept` a value that is computed before"),
        (ReturnsEarlyValue, r"what is computed before `net.\d` without being an argument of it is returned"),
    ],
)
def test_what_a_step_of_a_pipeline_cannot_do_is_refused_on_all_ranks_at_once(module: type[Net], said: str) -> None:
    def fit() -> None:
        with pytest.raises(MisconfigurationException, match=said):
            trainer_with(MAKE["pp"]()).fit(module(), small_loader())

    run_on_ranks(fit, 2, deadline_seconds=30)
