"""A rank is killed, raises, hangs or is told to stop: the others end in time, and say which rank and why."""

import operator
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_memopt import full_state_dict, latest_checkpoint
from lightning_memopt.parallel.verdict import Beat
from lightning_memopt.parallel.watch import RankWatch
from lightning_memopt.strategies.data_parallel import DataParallelStrategy
from lightning_memopt.strategies.hybrid import HybridStrategy
from lightning_memopt.strategies.pipeline import PipelineParallelStrategy
from lightning_memopt.strategies.tensor import TensorParallelStrategy
from tests.ending import Ending, end_of_ranks

STRATEGIES: dict[str, Callable[..., Any]] = {
    "memopt_ddp": lambda **options: DataParallelStrategy("none", **options),
    "memopt_zero1": lambda **options: DataParallelStrategy("optimizer", **options),
    "memopt_zero2": lambda **options: DataParallelStrategy("gradients", **options),
    "memopt_zero3": lambda **options: DataParallelStrategy("parameters", **options),
    "memopt_tp": lambda **options: TensorParallelStrategy(**options),
    "memopt_pp": lambda **options: PipelineParallelStrategy(**options),
    "memopt_hybrid": lambda **options: HybridStrategy(pipeline=2, shard=2, **options),
}
"""As a user gives them; one row each."""

RANKS = dict.fromkeys(STRATEGIES, 2) | {"memopt_hybrid": 4}

BATCH = 2
DEADLINE_SECONDS = 40


def wait_until_heard(watch: RankWatch) -> None:
    """Until the others know where this rank is, however busy the machine is: it tells, and then each reads."""
    end = time.monotonic() + 5  # some of the others may be gone by now
    for ranks in ([watch.rank], sorted(watch._beats)):
        heard = [count + 2 for count in _signs_of(watch, ranks)]
        while time.monotonic() < end and any(map(operator.lt, _signs_of(watch, ranks), heard)):
            time.sleep(0.01)


def _signs_of(watch: RankWatch, ranks: Iterable[int]) -> list[int]:
    return [Beat.decode(stored).count for stored in watch._store.multi_get(list(map(str, ranks)))]


@dataclass
class Fault:
    """What happens to which ranks, and where: the name of a hook, or of what the module computes."""

    place: str
    act: Callable[[], object]
    rank: int | tuple[int, ...] = 1
    struck: bool = False

    def strike(self, place: str, batch: int, module: pl.LightningModule) -> None:
        ranks = (self.rank,) if isinstance(self.rank, int) else self.rank
        if place == self.place and batch == BATCH and module.global_rank in ranks and not self.struck:
            self.struck = True  # once, however many micro-batches there are
            wait_until_heard(module.trainer.strategy._watch)
            self.act()


class _StrikeInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, strike: Callable[[], None]) -> torch.Tensor:
        ctx.strike = strike
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.strike()
        return gradient, None


class _Optimizer(torch.optim.AdamW):
    strike: Callable[[], None]

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.strike()
        return loss


class Module(pl.LightningModule):
    def __init__(self, fault: Fault | None) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(4)))
        self.fault = fault
        self.batch = -1

    def strike(self, place: str) -> None:
        if self.fault is not None:
            self.fault.strike(place, self.batch, self)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.batch = batch_idx
        hidden = self.layers[:2](batch[0])
        self.strike("forward")
        hidden = _StrikeInBackward.apply(hidden, lambda: self.strike("backward"))
        return self.layers[2:](hidden).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = _Optimizer(self.parameters(), lr=1e-3)
        optimizer.strike = lambda: self.strike("optimizer step")
        return optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.strike("checkpoint save")


def fit_module(strategy: Any, module: Module, **options: Any) -> None:
    strategy._watch.grace_seconds = 2  # in place of 10, to test faster
    loader = DataLoader(TensorDataset(torch.randn(64, 16)), batch_size=4)
    pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    ).fit(module, loader)


def fit_with(name: str, fault: Fault, folder: Any, every: int = 1, **watching: Any) -> list[Ending]:
    def fit() -> None:
        saves = ModelCheckpoint(folder, every_n_train_steps=every, save_last=True, save_on_exception=True)
        fit_module(STRATEGIES[name](**watching), Module(fault), callbacks=[saves])

    return end_of_ranks(fit, RANKS[name], DEADLINE_SECONDS)


def others_than(rank: int, endings: list[Ending]) -> list[Ending]:
    return [ending for other, ending in enumerate(endings) if other != rank]


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def fail() -> None:
    raise ValueError("a bad sample")


def assert_newest_is_whole(folder: Any) -> None:
    newest = latest_checkpoint(folder)
    assert newest is not None and full_state_dict(newest).keys() == Module(None).state_dict().keys()


PLACES = {
    "forward": "forward of batch 2",
    "backward": "backward of batch 2",
    "optimizer step": "optimizer step of batch 2",
    "checkpoint save": "",
}
FAST = {("memopt_ddp", "forward"), ("memopt_ddp", "checkpoint save"), ("memopt_zero3", "backward")}
"""What is tried at each change; the rest before a release."""

KILLED = [
    pytest.param(name, place, marks=() if (name, place) in FAST else pytest.mark.slow, id=f"{name}-{place}")
    for name in STRATEGIES
    for place in PLACES
]
ONE_FAST = [pytest.param(name, marks=() if name == "memopt_ddp" else pytest.mark.slow) for name in STRATEGIES]


@pytest.mark.parametrize(("name", "place"), KILLED)
def test_the_others_end_and_name_a_rank_that_was_killed(name: str, place: str, tmp_path: Any) -> None:
    # What is struck in the backward is on the first stage of a pipeline.
    killed = 0 if (name, place) == ("memopt_pp", "backward") else 1
    endings = fit_with(name, Fault(place, send(signal.SIGKILL), rank=killed), tmp_path)
    for other in others_than(killed, endings):
        assert other.failed_with(f"Rank {killed} ", PLACES[place], "its process ended without a word"), other
    assert_newest_is_whole(tmp_path)


@pytest.mark.parametrize("name", ONE_FAST)
def test_the_others_end_and_name_rank_0_which_holds_the_store_when_it_is_killed(name: str, tmp_path: Any) -> None:
    for other in others_than(0, fit_with(name, Fault("forward", send(signal.SIGKILL), rank=0), tmp_path)):
        assert other.failed_with("Rank 0 ", "forward of batch 2", "its process ended without a word"), other


@pytest.mark.parametrize("faulty", [0, 1])
@pytest.mark.parametrize("name", ONE_FAST)
def test_the_others_end_with_the_cause_of_a_rank_that_raised(name: str, faulty: int, tmp_path: Any) -> None:
    endings = fit_with(name, Fault("forward", fail, rank=faulty), tmp_path)
    for other in others_than(faulty, endings):
        assert other.failed_with(f"Rank {faulty} ", "forward of batch 2", "ValueError: a bad sample"), other
        # It says so at once, and not only in a traceback, before which launchers may end it.
        assert re.search(rf"^\[rank \d\] RankFailure: Rank {faulty} ", other.said, re.MULTILINE), other
    itself = endings[faulty]
    assert itself.failed_with("ValueError: a bad sample") and not itself.failed_with("RankFailure"), itself
    assert_newest_is_whole(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("place", [place for place in PLACES if place != "forward"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_others_end_with_the_cause_of_a_rank_that_raised_past_its_forward(
    name: str, place: str, tmp_path: Any
) -> None:
    faulty = 0 if (name, place) == ("memopt_pp", "backward") else 1
    endings = fit_with(name, Fault(place, fail, rank=faulty), tmp_path)
    for other in others_than(faulty, endings):
        assert other.failed_with(f"Rank {faulty} ", PLACES[place], "ValueError: a bad sample"), other
    assert endings[faulty].failed_with("ValueError: a bad sample"), endings[faulty]
    assert_newest_is_whole(tmp_path)


@pytest.mark.parametrize("name", ONE_FAST)
def test_no_rank_waits_for_a_save_on_exception_when_one_raised(name: str, tmp_path: Any) -> None:
    endings = fit_with(name, Fault("forward", fail), tmp_path, every=100)
    for other in others_than(1, endings):
        assert other.failed_with("Rank 1 ", "ValueError: a bad sample"), other
    itself = endings[1]
    assert itself.failed_with("ValueError: a bad sample", "no checkpoint is saved"), itself


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_others_end_and_name_a_rank_that_was_stopped(name: str, tmp_path: Any) -> None:
    endings = fit_with(name, Fault("forward", send(signal.SIGSTOP)), tmp_path, silent_seconds=2)
    for other in others_than(1, endings):
        assert other.failed_with("Rank 1 ", "forward of batch 2", "no sign of life"), other
    assert_newest_is_whole(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_all_end_and_name_a_rank_that_the_others_wait_for(name: str, tmp_path: Any) -> None:
    fault = Fault("forward", lambda: time.sleep(1000))
    for ending in fit_with(name, fault, tmp_path, stuck_seconds=2):
        assert ending.failed_with("Rank 1 ", "forward of batch 2", "waited for it", "test_faults.py"), ending


@pytest.mark.parametrize("name", ONE_FAST)
def test_all_end_and_name_a_rank_that_lives_and_does_nothing(name: str, tmp_path: Any) -> None:
    fault = Fault("forward", lambda: time.sleep(1000))
    for ending in fit_with(name, fault, tmp_path, silent_seconds=4):
        assert ending.failed_with(
            "Rank 1 ", "forward of batch 2", "computed, read and written nothing", "test_faults.py"
        ), ending
    assert_newest_is_whole(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("place", [place for place in PLACES if place != "forward"])
@pytest.mark.parametrize("name", ["memopt_ddp", "memopt_zero3", "memopt_pp"])
def test_all_end_and_name_a_rank_that_does_nothing_past_its_forward(name: str, place: str, tmp_path: Any) -> None:
    faulty = 0 if (name, place) == ("memopt_pp", "backward") else 1
    for ending in fit_with(name, Fault(place, lambda: time.sleep(1000), rank=faulty), tmp_path, silent_seconds=4):
        assert ending.failed_with(f"Rank {faulty} ", PLACES[place], "computed, read and written nothing"), ending
    assert_newest_is_whole(tmp_path)


def compute_for(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


def wait_for_a_process(seconds: float) -> None:
    subprocess.run(
        [sys.executable, "-c", f"import time; end = time.time() + {seconds}\nwhile time.time() < end: pass"],
        check=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("work", [compute_for, wait_for_a_process])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_rank_that_is_slow_is_waited_for(name: str, work: Callable[[float], None], tmp_path: Any) -> None:
    for ending in fit_with(name, Fault("forward", lambda: work(10)), tmp_path, silent_seconds=4):
        assert ending.code == 0, ending


@pytest.mark.parametrize("told", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("name", ONE_FAST)
def test_all_stop_before_the_same_batch_on_sigterm_to_any(name: str, told: tuple[int, ...], tmp_path: Any) -> None:
    fault = Fault("forward", send(signal.SIGTERM), rank=told)
    for ending in fit_with(name, fault, tmp_path):
        assert ending.failed_with(f"Rank {told[-1]} received SIGTERM: all ranks stop before batch 3"), ending
    assert_newest_is_whole(tmp_path)


def test_a_module_that_differs_by_rank_is_refused_on_all_ranks_by_name() -> None:
    class Different(Module):
        def __init__(self) -> None:
            super().__init__(None)
            self.head = nn.Linear(16, 2 + int(os.environ["RANK"]))

    endings = end_of_ranks(lambda: fit_module(STRATEGIES["memopt_zero3"](), Different()), 2, DEADLINE_SECONDS)
    for ending in endings:
        assert ending.failed_with("MisconfigurationException", "on rank 0 `head.weight` is (2, 16)", "(3, 16)"), (
            ending
        )
