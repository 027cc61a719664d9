"""What each rank of a parallel benchmark runs: a Trainer or a loop by hand, one step each time it is told to."""

import os
import time
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
import workload
from by_hand import BY_HAND
from paired import TakeTurns
from parallel_workload import Size
from torch.distributed.fsdp import fully_shard
from torch.optim.optimizer import register_optimizer_step_pre_hook
from workers import Channel

import lightning_memopt as memopt


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
        self.channel.send(time.perf_counter() - self.since)
        trainer.should_stop = True


class ShareOfWaiting(pl.Callback):
    """Takes turns and reports, of forward and backward, the wall time and the time that this rank computed.

    A rank that waits for a neighbour sleeps, so what its thread has not computed it has waited.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._since = (0.0, 0.0)

    def on_train_batch_start(self, *arguments: Any) -> None:
        """Wait for the word to go, and start both clocks."""
        self.channel.receive()
        self._since = _clocks()

    def on_before_optimizer_step(self, *arguments: Any) -> None:
        """Report what both clocks say."""
        self.channel.send(tuple(after - before for before, after in zip(self._since, _clocks(), strict=True)))


def train(channel: Channel, strategy: str, size: Size, kind: str) -> None:
    """Train under a strategy by name, with the callback that ``kind`` asks for.

    Args:
        channel: To the parent.
        strategy: One of this package's names, ``"ddp"``, or ``"ModelParallelStrategy"``.
        size: Of the workload.
        kind: ``"turns"``, ``"memory"``, ``"start"`` or ``"waiting"``.
    """
    since = time.perf_counter()
    workload.be_quiet()
    callback: pl.Callback = {
        "turns": lambda: TakeTurns(channel),
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
    trainer = workload.trainer(
        devices=int(os.environ["WORLD_SIZE"]), strategy=chosen, use_distributed_sampler=False, callbacks=[callback]
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
    dist.init_process_group("gloo")
    step = BY_HAND[strategy](size)
    before_optimizer = [_clocks()]
    register_optimizer_step_pre_hook(lambda *_: before_optimizer.append(_clocks()))
    while True:
        channel.receive()
        since = _clocks()
        step()
        if kind == "turns":
            channel.send(time.perf_counter() - since[0])
        else:
            channel.send(tuple(after - before for before, after in zip(since, before_optimizer.pop(), strict=True)))


def _clocks() -> tuple[float, float]:
    """Seconds on the wall, and seconds that this thread has computed."""
    return time.perf_counter(), time.thread_time()
