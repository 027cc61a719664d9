"""Lightning's side of measuring memory during training: when to look, what to log, what to write."""

import logging
import mmap
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_memopt.memory.command import MEASURED, PREDICTED
from lightning_memopt.memory.html import SampledStep, render_html
from lightning_memopt.memory.postmortem import examine, write_post_mortem
from lightning_memopt.memory.report import CATEGORIES, MemoryReport, format_bytes
from lightning_memopt.memory.track import track_memory
from lightning_memopt.models.fake import is_fake
from lightning_memopt.models.instance_patch import Patches, replaced
from lightning_memopt.models.lazy import find_uninitialized
from lightning_memopt.models.out_of_memory import is_out_of_memory
from lightning_memopt.techniques.batches import tensors_in

_log = logging.getLogger(__name__)

_NEVER = sys.maxsize
_FIRST_STEPS = 2  # the first has no optimizer state while it computes, the second is as all later ones
_RESERVE_BYTES = 48 * 2**20
_GIB_FROM = 10 * 2**30


class MemoryMonitor(Callback):
    """Measures what uses the memory of a training step, now and then, and shows it.

    The first two optimizer steps and then one in ``every_n_steps`` run inside
    :class:`~lightning_memopt.memory.track.track_memory`, which makes them slower; between them the monitor costs one
    comparison a batch. What is sampled is a whole optimizer step with all the batches that are accumulated for it;
    one that is interrupted by a validation ends there.

    Each sample goes to all loggers of the trainer (``memory/peak_bytes`` and ``memory/<category>_bytes``, bytes, of
    rank zero) and to the progress bar (``peak_MiB``, from 10 GiB ``peak_GiB``). When training ends, also by Ctrl-C or
    an error, rank zero writes into ``dirpath`` the highest of the samples: ``memory_timeline.png`` (needs the
    ``plot`` extra), ``memory_report.html``, ``memory_report.json`` and, where there is a prediction,
    ``memory_predicted.json``: ``lightning-memopt report`` compares them. After an out-of-memory error each rank where
    it happened writes a post-mortem instead, ``out_of_memory.txt``, ``.json`` and ``.html``; then the error goes on.
    Under ``fast_dev_run`` nothing is written.

    Args:
        every_n_steps: Distance of the samples in optimizer steps, at least 1.
        dirpath: Folder of the report; by default ``memopt_report`` in the logger's folder or, without a logger, in
            ``trainer.default_root_dir``.
        predicted: What :func:`lightning_memopt.predict_memory` said, to be shown next to the measurement.

    Attributes:
        history: The sampled steps with their peaks, oldest first.
        highest: The full report of the sampled step with the highest peak; None before the first sample.

    Raises:
        MisconfigurationException: ``every_n_steps`` is no positive integer, ``dirpath`` is a file or not on this
            machine, or ``predicted`` is not a memory report; at the start of ``fit``, the trainer has a
            ``PyTorchProfiler``.

    Example:
        >>> trainer = pl.Trainer(callbacks=[MemoryMonitor(every_n_steps=500)], logger=False)
    """

    def __init__(
        self, every_n_steps: int = 200, dirpath: str | Path | None = None, *, predicted: MemoryReport | None = None
    ) -> None:
        if not isinstance(every_n_steps, int) or isinstance(every_n_steps, bool) or every_n_steps < 1:
            raise MisconfigurationException(
                f"MemoryMonitor(every_n_steps={every_n_steps!r}): samples are a whole number of optimizer steps "
                "apart; give an integer of at least 1"
            )
        if predicted is not None and not isinstance(predicted, MemoryReport):
            raise MisconfigurationException(
                f"MemoryMonitor(predicted=...) was given a {type(predicted).__name__}, which is not a prediction; "
                "give the MemoryReport that lightning_memopt.predict_memory returns"
            )
        self.every_n_steps = every_n_steps
        self.dirpath = None if dirpath is None else _local_folder(dirpath)
        self.predicted = predicted
        self.history: list[SampledStep] = []
        self.highest: MemoryReport | None = None
        self._folder: Path | None = None
        self._tracker: track_memory | None = None
        self._window_start = 0
        self._log_step = 0
        self._next_sample = _NEVER
        self._samples_of_this_run = 0
        self._last: MemoryReport | None = None
        self._reserve: mmap.mmap | None = None
        self._undo_patch = Patches()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if isinstance(trainer.profiler, PyTorchProfiler):  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "MemoryMonitor cannot work here: it reads the allocator by PyTorch's profiler, of which there can be "
                f"one, and the trainer has a {type(trainer.profiler).__name__}. "  # type: ignore[attr-defined]
                "Leave one of the two out, or take Lightning's SimpleProfiler or AdvancedProfiler."
            )
        # On every rank: the logger's folder is broadcast from rank zero.
        logged_to = trainer.log_dir or trainer.default_root_dir
        folder = self.dirpath or _local_folder(os.path.join(logged_to, "memopt_report"))
        # `fast_dev_run` writes no logs and no checkpoints either.
        self._folder = None if trainer.fast_dev_run else folder  # type: ignore[attr-defined]
        self.history, self.highest, self._last = [], None, None
        self._samples_of_this_run = 0
        # Given back when memory runs out, so that the post-mortem can be written. Its pages are never touched.
        self._reserve = mmap.mmap(-1, _RESERVE_BYTES)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_prediction = any(is_fake(parameter) for parameter in pl_module.parameters())
        self._next_sample = _NEVER if is_prediction else trainer.global_step
        # Not by self.log: Lightning goes through all that is logged at every step, which took 4% of a 3 ms step.
        if bar := trainer.progress_bar_callback:
            shown = partial(self._metrics_of_progress_bar, bar.get_metrics)
            self._undo_patch.enter_context(replaced(bar, get_metrics=shown))

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # The first forward of a lazy module gives its parameters their shapes, and takes what later ones do not.
        if trainer.global_step >= self._next_sample and not find_uninitialized(pl_module):
            self._open(trainer, pl_module, batch)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._tracker is not None and trainer.global_step > self._window_start:
            self._close(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close(trainer)
        peak = max((step.peak_bytes for step in self.history), default=0)
        peaks = trainer.strategy.all_gather(torch.tensor([peak], device=trainer.strategy.root_device))
        try:
            self._write_report(trainer, peaks.flatten().tolist())
        except OSError as failure:  # a full disk must not cost a training that went well
            rank_zero_warn(f"MemoryMonitor could not write its report: {failure}")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        try:
            if is_out_of_memory(exception):
                self._write_post_mortem(trainer, pl_module, exception)
            else:
                # No word from the other ranks: they may never come here.
                self._write_report(trainer, [])
        except Exception as failure:
            # The error that is on its way matters more than what became of the report about it.
            rank_zero_warn(f"MemoryMonitor could not write its report: {type(failure).__name__}: {failure}")
        finally:
            self._abandon()
            self._undo_patch.close()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._abandon()
        self._undo_patch.close()
        self._release_reserve()
        self._folder = None  # an error in a later validation or test is not this run's

    def __getstate__(self) -> dict[str, Any]:
        # Copies measure nothing that is under way, and the original keeps the memory that it set aside.
        return {**self.__dict__, "_tracker": None, "_reserve": None}

    def _open(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        self._tracker = track_memory(pl_module, trainer.optimizers, tensors_in(batch))
        self._tracker.__enter__()
        self._next_sample = _NEVER
        self._window_start = trainer.global_step
        self._log_step = trainer.fit_loop.epoch_loop._batches_that_stepped

    def _close(self, trainer: pl.Trainer) -> None:
        if self._tracker is None:
            return
        tracker, self._tracker = self._tracker, None
        tracker.__exit__(None, None, None)
        self._last = report = tracker.report()
        if self.highest is None or report.peak_bytes > self.highest.peak_bytes:
            self.highest = report
        self.history.append(SampledStep(self._window_start, report.peak_bytes, report.by_category))
        self._samples_of_this_run += 1
        done = trainer.global_step
        is_start = self._samples_of_this_run < _FIRST_STEPS
        self._next_sample = done if is_start else -(-done // self.every_n_steps) * self.every_n_steps
        metrics = {f"memory/{name}_bytes": float(report.by_category.get(name, 0)) for name in CATEGORIES}
        for logger in trainer.loggers:
            logger.log_metrics({"memory/peak_bytes": float(report.peak_bytes)} | metrics, step=self._log_step)

    def _metrics_of_progress_bar(
        self, others: Callable[..., dict[str, Any]], trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, Any]:
        metrics = others(trainer, pl_module)
        if self.history:
            # One unit for the whole run: the figure would otherwise appear under two names.
            unit, size = ("GiB", 2**30) if self.history[0].peak_bytes >= _GIB_FROM else ("MiB", 2**20)
            metrics[f"peak_{unit}"] = self.history[-1].peak_bytes / size
        return metrics

    def _write_report(self, trainer: pl.Trainer, peaks_by_rank: list[int]) -> None:
        if not trainer.is_global_zero or self.highest is None or self._folder is None:
            return
        step = next(s.step for s in self.history if s.peak_bytes == self.highest.peak_bytes)
        reports = {f"step {step}": self.highest}
        if self.predicted is not None:
            reports["predicted"] = self.predicted
        remarks = []
        if len(peaks_by_rank) > 1:
            each = ", ".join(f"rank {rank}: {format_bytes(peak)}" for rank, peak in enumerate(peaks_by_rank))
            remarks.append(f"Highest peak of all ranks: {format_bytes(max(peaks_by_rank))} ({each}).")
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / MEASURED).write_text(self.highest.to_json(), encoding="utf-8")
        # A folder may have been used before: another run's prediction must not stand beside this one's measurement.
        (self._folder / PREDICTED).unlink(missing_ok=True)
        if self.predicted is not None:
            (self._folder / PREDICTED).write_text(self.predicted.to_json(), encoding="utf-8")
        page = render_html(reports, title="Memory of this training run", history=self.history, remarks=remarks)
        (self._folder / "memory_report.html").write_text(page, encoding="utf-8")
        try:
            from lightning_memopt.memory.plots import plot_timelines

            plot_timelines(reports, self._folder / "memory_timeline.png")
        except ModuleNotFoundError as error:
            rank_zero_warn(f"MemoryMonitor leaves out its picture: {error}")
        rank_zero_info(f"Memory report: {self._folder / 'memory_report.html'}")

    def _write_post_mortem(self, trainer: pl.Trainer, pl_module: pl.LightningModule, error: BaseException) -> None:
        if self._folder is None:
            return
        self._release_reserve()
        device_type = trainer.strategy.root_device.type
        found = examine(
            error,
            pl_module,
            trainer.optimizers,
            device_type=device_type,
            last_report=self._last,
            is_training=not (trainer.validating or trainer.sanity_checking),
        )
        stem = "out_of_memory" if trainer.is_global_zero else f"out_of_memory_rank{trainer.global_rank}"
        text, *_ = write_post_mortem(found, self._folder, stem)
        _log.error("Out of memory; what was in use and what would have helped: %s", text)

    def _abandon(self) -> None:
        """End a measurement that is under way without looking at it."""
        tracker, self._tracker = self._tracker, None
        if tracker is None:
            return
        try:
            tracker.__exit__(None, None, None)
        except Exception as failure:
            rank_zero_warn(f"MemoryMonitor could not end its measurement: {type(failure).__name__}: {failure}")

    def _release_reserve(self) -> None:
        if self._reserve is not None:
            self._reserve.close()
            self._reserve = None


def _local_folder(path: str | Path) -> Path:
    if not isinstance(path, str | Path) or "://" in str(path):
        raise MisconfigurationException(
            f"MemoryMonitor would write its report to {path!r}, which is not a folder of this machine; "
            "give a local one as dirpath"
        )
    folder = Path(path)
    for part in (folder, *folder.parents):
        if part.is_file():
            raise MisconfigurationException(
                f"MemoryMonitor would write its report into {str(path)!r}, but {str(part)!r} is a file; "
                "give a folder, or a name that is free, as dirpath"
            )
    return folder
