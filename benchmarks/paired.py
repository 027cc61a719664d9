"""Step times as ratios that survive a noisy machine.

Two processes, plain Lightning and the technique, take turns: one step of the one, one step of the other, while
whoever waits sleeps on a pipe. Each pair of neighbouring steps gives one ratio, and whoever went first in one pair
goes second in the next, so that a machine that slows down or speeds up favours neither. The figure is the median
over the pairs: a burst of other work spoils the pairs it falls into, and no more.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, Protocol

import lightning.pytorch as pl
import workload
from rows import ROWS
from workers import Channel, Worker


class TakeTurns(pl.Callback):
    """Trains one step each time it is told to and says how long it took.

    Has to be the trainer's last callback: the clock runs from the word to go to the end of everyone's
    ``on_train_batch_end``, so that it counts all that a step costs.

    Args:
        channel: To the parent.
        clock: In seconds.
    """

    def __init__(self, channel: Channel, clock: Callable[[], float] = time.perf_counter) -> None:
        self.channel = channel
        self._clock = clock
        self._since = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Wait for the first turn."""
        self._wait()

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Report, and wait for the next turn."""
        self.channel.send(self._clock() - self._since)
        self._wait()

    def _wait(self) -> None:
        self.channel.receive()
        self._since = self._clock()


def train_in_turns(channel: Channel, row: str, size: workload.Size) -> None:
    """Body of a worker that trains the row's module for as long as it is asked to."""
    workload.be_quiet()
    options = ROWS[row].options()
    options["callbacks"] = [*options.get("callbacks", ()), TakeTurns(channel)]
    workload.trainer(**options).fit(size.build(), workload.loader(size.batch()))


class Stepper:
    """A run of one row that can be told to take a step.

    Args:
        row: Name of the row.
        size: Size of its workload.
        warm_up: Steps taken at once: the first allocates the optimizer's state.
    """

    def __init__(self, row: str, size: workload.Size, warm_up: int = 2) -> None:
        self._worker = Worker(train_in_turns, row, size)
        for _ in range(warm_up):
            self.step()

    def step(self) -> float:
        """Train one step and return its seconds."""
        self._worker.send("go")
        return self._worker.receive()

    def __enter__(self) -> "Stepper":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._worker.__exit__(*exception)


@dataclass(frozen=True)
class PairedTime:
    """Step times of a technique against plain Lightning.

    Attributes:
        ratio: Median of the ratios of neighbouring steps.
        quartiles: The ratios' lower and upper quartile.
        seconds: Median seconds of a step with the technique.
        plain_seconds: Median seconds of the plain steps beside them.
        pairs: How many pairs.
    """

    ratio: float
    quartiles: tuple[float, float]
    seconds: float
    plain_seconds: float
    pairs: int


class TakesSteps(Protocol):
    """Anything that can be told to take a step and says how many seconds it took."""

    def step(self) -> float:
        """Take a step."""
        ...


def compare_steps(plain: TakesSteps, technique: TakesSteps, pairs: int) -> PairedTime:
    """Let both take ``pairs`` steps by turns."""
    plain_seconds, seconds = [], []
    for pair in range(pairs):
        first, second = (plain_seconds, plain), (seconds, technique)
        for taken, stepper in (first, second) if pair % 2 == 0 else (second, first):
            taken.append(stepper.step())
    ratios = [own / other for own, other in zip(seconds, plain_seconds, strict=True)]
    lower, _, upper = quantiles(ratios, n=4, method="inclusive")
    return PairedTime(median(ratios), (lower, upper), median(seconds), median(plain_seconds), pairs)
