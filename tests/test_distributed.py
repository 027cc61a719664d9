"""The harness for distributed tests: values come back, and no failure hangs or hides."""

import os
import signal
import time

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankFailed, run_on_ranks
from tests.parity import train
from tests.zoo import ZOO

pytestmark = pytest.mark.distributed


def _sum_of_ranks() -> float:
    dist.init_process_group("gloo")
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    return float(total)


def _children() -> list[str]:
    with open(f"/proc/self/task/{os.getpid()}/children") as children:
        return children.read().split()


def test_each_rank_returns_its_own_value_in_the_order_of_ranks():
    assert run_on_ranks(lambda: int(os.environ["LOCAL_RANK"]) * 10, 3) == [0, 10, 20]


def test_the_ranks_form_a_process_group():
    assert run_on_ranks(_sum_of_ranks, 2) == [3.0, 3.0]


def test_a_trainer_takes_the_ranks_as_launched_from_outside():
    def fit() -> tuple[int, int]:
        entry = ZOO["mlp"]
        run = train(entry.build(), entry.loader(batches=2), steps=2, devices=2, strategy="ddp")
        return run.trainer.global_rank, run.trainer.world_size

    assert run_on_ranks(fit, 2) == [(0, 2), (1, 2)]


def test_ranks_train_after_the_parent_process_has_trained():
    entry = ZOO["mlp"]
    train(entry.build(), entry.loader(batches=1), steps=1)
    assert run_on_ranks(lambda: len(train(entry.build(), entry.loader(batches=1), steps=1).losses), 2) == [1, 1]


def test_an_exception_surfaces_with_its_rank_and_traceback():
    def fail_on_one() -> None:
        if os.environ["LOCAL_RANK"] == "1":
            raise ValueError("no such luck")
        time.sleep(60)

    start = time.monotonic()
    with pytest.raises(RankFailed, match=r"(?s)rank 1 raised.*fail_on_one.*ValueError: no such luck"):
        run_on_ranks(fail_on_one, 2, deadline_seconds=30)
    assert time.monotonic() - start < 20


def test_the_deadline_names_the_ranks_that_still_run_and_leaves_none_behind():
    def hang_on_one() -> None:
        if os.environ["LOCAL_RANK"] == "1":
            time.sleep(60)

    before = _children()
    with pytest.raises(RankFailed, match=r"rank 1 of 2 still running after 1 s"):
        run_on_ranks(hang_on_one, 2, deadline_seconds=1)
    assert _children() == before


def test_a_killed_rank_is_named_with_its_signal():
    def die() -> None:
        if os.environ["LOCAL_RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    with pytest.raises(RankFailed, match="rank 0 died without returning: SIGKILL"):
        run_on_ranks(die, 2, deadline_seconds=30)


def test_a_value_that_cannot_travel_is_an_error_of_its_rank():
    with pytest.raises(RankFailed, match=r"(?s)rank 0 raised.*(pickle|local object)"):
        run_on_ranks(lambda: lambda: None, 1)


def test_what_a_rank_changes_stays_in_it():
    module = pl.LightningModule()

    def change() -> None:
        module.changed = True
        os.environ["LEFT_BEHIND"] = "1"

    run_on_ranks(change, 1)
    assert not hasattr(module, "changed")
    assert "LEFT_BEHIND" not in os.environ
