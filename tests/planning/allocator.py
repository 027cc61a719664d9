"""A second opinion on the peak: the profiler's raw events around Lightning's own loop, and nothing else."""

from collections.abc import Callable, Sequence
from itertools import repeat
from time import time_ns
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.autograd.profiler import profile
from torch.utils._pytree import tree_map_only

from tests.zoo import Entry


class _Window(Callback):
    """Notes when the second optimizer step begins and ends, and stops after it."""

    def __init__(self) -> None:
        self.begin = self.end = 0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if not self.begin and trainer.global_step > 0:
            self.begin, self.steps = time_ns(), trainer.global_step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self.begin and not self.end and trainer.global_step > self.steps:
            self.end = time_ns()
            trainer.should_stop = True


class _Again:
    """A loader that gives one batch again and again."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __iter__(self) -> Any:
        return repeat(self.batch, len(self))

    def __len__(self) -> int:
        return 100


def raw_peak_bytes(
    build: Callable[[], pl.LightningModule],
    batch: Any,
    callbacks: Sequence[Callback] = (),
    plugins: Sequence[Any] = (),
    **trainer_options: Any,
) -> int:
    """The most bytes that the CPU allocator had out during the second optimizer step.

    The module is built while the profiler watches, because it tells the release only of what it saw allocated.
    """
    window = _Window()
    options = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    with profile(profile_memory=True) as profiler:
        own_batch = tree_map_only(torch.Tensor, torch.clone, batch)
        module = build()
        trainer = pl.Trainer(**(options | trainer_options), callbacks=[window, *callbacks], plugins=list(plugins))
        trainer.fit(module, _Again(own_batch))
    assert window.end, "the second step never came"
    total, peak = 0, None
    for time, size_bytes in sorted(_events(profiler.kineto_results.experimental_event_tree())):
        if window.begin <= time <= window.end:
            peak = max(total if peak is None else peak, total + size_bytes)
        total += size_bytes
    assert peak is not None
    return peak


def _events(tree: Any) -> list[tuple[int, int]]:
    found, pending = [], list(tree)
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.name == "[memory]":
            found.append((event.start_time_ns, event.typed[1].alloc_size))
    return found


def clipping(entry: Entry) -> dict[str, float]:
    """Lightning clips the gradients of what it optimizes itself."""
    return {"gradient_clip_val": 0.5} if entry.automatic else {}
