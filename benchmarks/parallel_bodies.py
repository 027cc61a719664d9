"""What each rank of a parallel benchmark runs: a Trainer or a loop by hand, one step each time it is told to."""

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
import workload
from by_hand import BY_HAND
from paired import TakeTurns
from parallel_workload import Size
from rank_device import BACKENDS, clock, device, kind_for
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import schedules
from torch.optim.optimizer import register_optimizer_step_pre_hook
from workers import Channel

import lightning_memopt as memopt
from lightning_memopt.parallel.watch import RankWatch


class LightningSharded(workload.CausalLanguageModel):
    """What Lightning's ModelParallelStrategy asks of a user: to shard the model in ``configure_model``."""

    def configure_model(self) -> None:
        """Shard each block, and the rest."""
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh, reshard_after_forward=False)


class MeasureStep(pl.Callback):
    """Sends the peak of the second step, when the optimizer's state is in place, and ends the training."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.tracker: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        """Begin to count."""
        if index == 1:
            self.tracker = memopt.track_memory(module, *trainer.optimizers, batch)
            self.tracker.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        """Send what was counted."""
        if self.tracker is not None:
            self.tracker.__exit__(None, None, None)
            self.channel.send(self.tracker.report().peak_bytes)
            self.tracker = None
            trainer.should_stop = True


class TellFirstStep(pl.Callback):
    """Sends how long it took from ``since`` to the end of the first step, and ends the training."""

    def __init__(self, channel: Channel, since: float) -> None:
        self.channel = channel
        self.since = since

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        """Send it."""
        self.channel.send(clock() - self.since)
        trainer.should_stop = True


class ShareOfWaiting(pl.Callback):
    """Takes turns and reports, of forward and backward, the wall time and the time that this rank did not wait."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._waits = Waits()
        self._since = (0.0, 0.0)

    def on_train_batch_start(self, *arguments: Any) -> None:
        """Wait for the word to go, and start both clocks."""
        self.channel.receive()
        self._since = self._waits.clocks()

    def on_before_optimizer_step(self, *arguments: Any) -> None:
        """Report what both clocks say."""
        self.channel.send(self._waits.since(self._since))


class Waits:
    """Times how long this process, from now on, waits for other ranks.

    Told apart from processor time, which a rank that has something to compute may be kept from by others' processes:
    then the machine is busy, and the pipeline is not idle.
    """

    def __init__(self) -> None:
        self._waited = 0.0
        for owner, name in ((schedules, "_wait_batch_p2p"), (dist, "broadcast_object_list"), (dist, "all_reduce")):
            setattr(owner, name, partial(self._timed, getattr(owner, name)))

    def clocks(self) -> tuple[float, float]:
        """Seconds on the wall, and those of them that were not spent waiting."""
        now = clock()
        return now, now - self._waited

    def since(self, before: tuple[float, float]) -> tuple[float, float]:
        """How far both have gone."""
        wall, computed = self.clocks()
        return wall - before[0], computed - before[1]

    def _timed(self, wait: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        since = time.perf_counter()
        try:
            return wait(*args, **kwargs)
        finally:
            self._waited += time.perf_counter() - since


def train(channel: Channel, strategy: str, size: Size, kind: str) -> None:
    """Train under a strategy by name, with the callback that ``kind`` asks for.

    Args:
        channel: To the parent.
        strategy: One of this package's names, ``"ddp"``, or ``"ModelParallelStrategy"``.
        size: Of the workload.
        kind: ``"turns"``, ``"processor"`` (turns in processor time), ``"unwatched"`` (that without the watch over
            the other ranks), ``"memory"``, ``"start"`` or ``"waiting"``.
    """
    since = time.perf_counter()
    workload.be_quiet()
    if kind == "unwatched":
        RankWatch.start = lambda watch: None  # type: ignore[method-assign]
    callback: pl.Callback = {
        "turns": lambda: TakeTurns(channel, clock),
        "processor": lambda: TakeTurns(channel, time.process_time),
        "unwatched": lambda: TakeTurns(channel, time.process_time),
        "memory": lambda: MeasureStep(channel),
        "start": lambda: TellFirstStep(channel, since),
        "waiting": lambda: ShareOfWaiting(channel),
    }[kind]()
    module: pl.LightningModule = size.build()
    chosen: Any = strategy
    if strategy == "ModelParallelStrategy":
        from lightning.pytorch.strategies import ModelParallelStrategy

        module = LightningSharded(size.build_model())
        chosen = ModelParallelStrategy(data_parallel_size=int(os.environ["WORLD_SIZE"]), tensor_parallel_size=1)
    elif strategy == "ddp":
        from lightning.pytorch.strategies import DDPStrategy

        chosen = DDPStrategy(gradient_as_bucket_view=True)
    elif strategy == "memopt_pp":
        chosen = memopt.PipelineParallelStrategy(microbatches=size.micro_batches)
    shares_batch = strategy in ("memopt_tp", "memopt_pp")
    batch = size.batch(0 if shares_batch else int(os.environ["RANK"]))
    ranks = int(os.environ["WORLD_SIZE"])
    trainer = workload.trainer(
        accelerator=kind_for(ranks),
        devices=ranks,
        strategy=chosen,
        use_distributed_sampler=False,
        callbacks=[callback],
    )
    trainer.fit(module, workload.loader(batch))


def loop_by_hand(channel: Channel, strategy: str, size: Size, kind: str = "turns") -> None:
    """Run the loop by hand that does what ``strategy`` does.

    Args:
        channel: To the parent.
        strategy: One of this package's names.
        size: Of the workload.
        kind: ``"turns"``, or ``"waiting"``: what :class:`ShareOfWaiting` reports.
    """
    workload.be_quiet()
    dist.init_process_group(BACKENDS[device().type])
    step = BY_HAND[strategy](size)
    waits = Waits()
    since = waits.clocks()
    before_optimizer: list[tuple[float, float]] = []
    register_optimizer_step_pre_hook(lambda *_: before_optimizer.append(waits.since(since)))
    while True:
        channel.receive()
        since = waits.clocks()
        step()
        if kind == "turns":
            channel.send(clock() - since[0])
        else:
            channel.send(before_optimizer.pop())
