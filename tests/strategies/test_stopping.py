"""Training that one rank decides to end ends on all of them, after the same batch and as on one device."""

import os
import signal
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.nn import functional as F

from tests.distributed import run_on_ranks
from tests.strategies.users import MAKE, Net, small_loader, trainer_with


class Validates(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class Stops(Callback):
    """Sets ``should_stop`` in a hook, after two optimizer steps and on the last rank alone."""

    def __init__(self, hook: str) -> None:
        self.validated_at: list[int] = []
        own = getattr(self, hook)
        setattr(self, hook, lambda trainer, *args: (own(trainer, *args), self._stop(trainer)))

    def _stop(self, trainer: Any) -> None:
        if trainer.global_step >= 2 and trainer.global_rank == trainer.world_size - 1:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.validated_at.append(trainer.global_step)


def _fit(ranks: int, strategy: Any, hook: str) -> tuple[int, int, list[int]]:
    stops = Stops(hook)
    trainer = trainer_with(strategy, devices=ranks, callbacks=[stops], max_epochs=3, val_check_interval=2)
    trainer.fit(Validates(), small_loader(4), small_loader(2))
    return trainer.global_step, trainer.current_epoch, stops.validated_at


@pytest.mark.parametrize(
    ("strategy", "hook"),
    [("ddp", "on_train_batch_end"), ("zero3", "on_validation_end"), ("pp", "on_train_epoch_end")],
)
def test_all_ranks_stop_where_one_says_so(strategy: str, hook: str) -> None:
    plain = run_on_ranks(lambda: _fit(1, "auto", hook), 1)[0]
    assert plain[1] == 1
    assert run_on_ranks(lambda: _fit(2, MAKE[strategy](), hook), 2, deadline_seconds=30) == [plain, plain]


class EndsBeforeItBegan(Validates):
    """Says in a hook on rank 0 alone that training is over."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        setattr(self, hook, self._stop)

    def _stop(self) -> None:
        self.trainer.should_stop |= self.trainer.global_rank == 0


@pytest.mark.parametrize(
    ("strategy", "hook"), [("ddp", "on_train_start"), ("pp", "on_fit_start"), ("zero3", "on_train_epoch_start")]
)
def test_no_rank_begins_where_one_says_before_the_first_batch_that_training_is_over(strategy: str, hook: str) -> None:
    def fit() -> int:
        trainer = trainer_with(MAKE[strategy]())
        trainer.fit(EndsBeforeItBegan(hook), small_loader(4))
        return trainer.global_step

    assert run_on_ranks(fit, 2, deadline_seconds=30) == [0, 0]


class EndsEpochs(Net):
    """Ends each epoch after two batches, on rank 0 alone."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if batch_idx == 2 and self.trainer.global_rank == 0 else None


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "pp"])
def test_an_epoch_that_a_hook_ends_on_one_rank_ends_on_all(strategy: str) -> None:
    def fit() -> tuple[int, int]:
        trainer = trainer_with(MAKE[strategy](), max_epochs=2)
        trainer.fit(EndsEpochs(), small_loader(4))
        return trainer.global_step, trainer.current_epoch

    assert run_on_ranks(fit, 2, deadline_seconds=30) == [(4, 2), (4, 2)]


class IsTold(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("name", ["ddp", "zero3"])
def test_a_rank_that_is_alone_stops_on_sigterm(name: str) -> None:
    def fit() -> int:
        trainer = trainer_with(MAKE[name](), devices=1, max_epochs=1)
        with pytest.raises(SIGTERMException):
            trainer.fit(IsTold(), small_loader(4))
        return trainer.global_step

    assert run_on_ranks(fit, 1) == [2]
