"""MemoryMonitor inside a Trainer: when it samples, what it shows, what it writes, and what it must not disturb."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_memopt.callbacks.monitor import MemoryMonitor
from lightning_memopt.memory.report import CATEGORIES, format_bytes
from tests.distributed import run_on_ranks
from tests.memory.synthetic import report_of_a_step
from tests.parity import assert_parity, quiet_trainer, train
from tests.zoo import LARGER, ZOO, slow_where
from tests.zoo.plain import MLP

REPORT_FILES = {"memory_report.html", "memory_report.json", "memory_timeline.png"}
POST_MORTEM_FILES = {"out_of_memory.txt", "out_of_memory.json", "out_of_memory.html"}
QUIET = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "enable_model_summary": False}


class RecordingLogger(Logger):
    def __init__(self):
        super().__init__()
        self.rows = []

    @property
    def name(self):
        return "recording"

    @property
    def version(self):
        return 0

    def log_metrics(self, metrics, step=None):
        if "memory/peak_bytes" in metrics:
            self.rows.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass


class WatchedBatches(Callback):
    """For each training batch, whether a tracker was looking on when its optimizer step or its end came."""

    def __init__(self):
        self.tracked = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if len(self.tracked) == trainer.fit_loop.epoch_loop.total_batch_idx:
            self.tracked.append(bool(_get_current_dispatch_mode_stack()))


class Raising(Callback):
    """Raises ``error`` at the start of the batch ``at``, after the monitor's own hook."""

    def __init__(self, error, at=3):
        self.error, self.at = error, at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.at:
            raise self.error


def sampled_steps(monitor):
    return [sample.step for sample in monitor.history]


def names_in(folder):
    return {path.name for path in Path(folder).iterdir()}


@pytest.mark.parametrize("name", slow_where(ZOO, [*LARGER, "gpt2"]))
def test_training_is_the_same_to_the_bit_under_the_monitor(name, tmp_path):
    monitor = MemoryMonitor(every_n_steps=19, dirpath=tmp_path)
    assert_parity(ZOO[name], [monitor], dropout=0.1, rtol=0, atol=0)
    assert monitor.history[1].by_category["optimizer_state"] > 0


def test_the_first_two_steps_are_sampled_and_then_one_in_n(tmp_path):
    monitor, watched = MemoryMonitor(every_n_steps=5, dirpath=tmp_path), WatchedBatches()
    train(ZOO["mlp"].build(), ZOO["mlp"].loader(), steps=13, callbacks=[monitor, watched])
    assert sampled_steps(monitor) == [0, 1, 5, 10]
    assert [i for i, tracked in enumerate(watched.tracked) if tracked] == [0, 1, 5, 10]
    assert len(watched.tracked) == 13


def test_every_step_can_be_sampled(tmp_path):
    monitor = MemoryMonitor(every_n_steps=1, dirpath=tmp_path)
    train(ZOO["mlp"].build(), ZOO["mlp"].loader(), steps=4, callbacks=[monitor])
    assert sampled_steps(monitor) == [0, 1, 2, 3]


def test_the_second_step_has_the_optimizer_state_that_the_first_made(tmp_path):
    monitor = MemoryMonitor(dirpath=tmp_path)
    run = train(ZOO["mlp"].build(), ZOO["mlp"].loader(), steps=3, callbacks=[monitor])
    parameters = sum(p.numel() * p.element_size() for p in run.module.parameters())
    assert monitor.history[1].by_category["parameters"] == parameters
    assert 2 * parameters <= monitor.history[1].by_category["optimizer_state"] < 2.1 * parameters


def test_a_sample_spans_all_batches_that_are_accumulated_for_a_step(tmp_path):
    monitor = MemoryMonitor(every_n_steps=3, dirpath=tmp_path)
    module, phases = ZOO["mlp"].build(), []
    train(module, ZOO["mlp"].loader(), steps=4, callbacks=[monitor], accumulate_grad_batches=4)
    assert sampled_steps(monitor) == [0, 1, 3]
    for point in monitor.highest.timeline:
        if not phases or phases[-1] != point.phase:
            phases.append(point.phase)
    assert phases.count("backward") == 4
    assert phases.count("step") == 1


def test_a_manual_loop_with_two_optimizers_is_sampled_batch_by_batch(tmp_path):
    monitor = MemoryMonitor(every_n_steps=6, dirpath=tmp_path)
    run = train(ZOO["gan"].build(), ZOO["gan"].loader(), steps=20, callbacks=[monitor])
    # Each batch takes two optimizer steps.
    assert sampled_steps(monitor) == [0, 2, 6, 12, 18]
    parameters = sum(p.numel() * p.element_size() for p in run.module.parameters())
    assert monitor.history[-1].by_category["optimizer_state"] >= 2 * parameters


def test_a_validation_in_the_middle_of_a_step_is_not_measured(tmp_path):
    entry, modes = ZOO["mlp"], []
    monitor = MemoryMonitor(every_n_steps=1, dirpath=tmp_path)

    class Look(Callback):
        def on_validation_batch_start(self, *args):
            modes.append(_get_current_dispatch_mode_stack())

    trainer = pl.Trainer(
        **QUIET, logger=False, enable_progress_bar=False, max_steps=3, accumulate_grad_batches=4,
        val_check_interval=2, num_sanity_val_steps=0, callbacks=[monitor, Look()],
    )  # fmt: skip
    trainer.fit(entry.build(), entry.loader(12), entry.loader(1))
    assert modes and not any(modes)
    assert trainer.global_step == 3


def test_each_sample_goes_to_every_logger_in_bytes(tmp_path):
    first, second = RecordingLogger(), RecordingLogger()
    monitor = MemoryMonitor(every_n_steps=4, dirpath=tmp_path)
    train(ZOO["mlp"].build(), ZOO["mlp"].loader(), steps=6, callbacks=[monitor], logger=[first, second])
    assert [step for step, _ in first.rows] == [0, 1, 4]
    assert first.rows == second.rows
    for (_, metrics), sample in zip(first.rows, monitor.history, strict=True):
        assert metrics["memory/peak_bytes"] == sample.peak_bytes
        assert sum(metrics[f"memory/{name}_bytes"] for name in CATEGORIES) == sample.peak_bytes


def test_the_csv_logger_keeps_the_samples_beside_the_losses_and_holds_the_report(tmp_path):
    logger = CSVLogger(tmp_path)
    train(
        ZOO["mlp"].build(), ZOO["mlp"].loader(), steps=4, callbacks=[MemoryMonitor()], logger=logger,
        log_every_n_steps=1,
    )  # fmt: skip
    header = Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"memory/peak_bytes", "memory/activations_bytes", "train_loss"} <= set(header)
    assert names_in(Path(logger.log_dir, "memopt_report")) == REPORT_FILES


def test_without_logger_and_folder_the_report_goes_below_the_default_root(tmp_path):
    train(ZOO["mlp"].build(), ZOO["mlp"].loader(), steps=2, callbacks=[MemoryMonitor()], default_root_dir=tmp_path)
    assert names_in(tmp_path / "memopt_report") == REPORT_FILES


def test_the_progress_bar_shows_the_current_peak_in_readable_units(tmp_path):
    shown = {}

    class Bar(TQDMProgressBar):
        def on_train_epoch_end(self, trainer, pl_module):
            shown.update(self.get_metrics(trainer, pl_module))
            super().on_train_epoch_end(trainer, pl_module)

    monitor = MemoryMonitor(dirpath=tmp_path)
    run = train(
        ZOO["mlp"].build(), ZOO["mlp"].loader(), steps=5, callbacks=[monitor, Bar()], enable_progress_bar=True
    )
    assert shown["peak_MiB"] == pytest.approx(monitor.history[-1].peak_bytes / 2**20, rel=1e-3)
    assert "peak_MiB" not in run.trainer.logged_metrics


def test_the_progress_bar_is_as_it_was_after_fit_and_after_an_error(tmp_path):
    class Fails(pl.Callback):
        def on_train_batch_end(self, *arguments):
            raise RuntimeError("no such luck")

    for others in ([], [Fails()]):
        bar = TQDMProgressBar()
        with pytest.raises(RuntimeError, match="no such luck") if others else nullcontext():
            train(
                ZOO["mlp"].build(), ZOO["mlp"].loader(), steps=3, enable_progress_bar=True,
                callbacks=[MemoryMonitor(dirpath=tmp_path), bar, *others],
            )  # fmt: skip
        assert "get_metrics" not in vars(bar)


def test_the_report_has_the_highest_sample_the_history_and_the_prediction(tmp_path):
    predicted = report_of_a_step(source="predicted")
    monitor = MemoryMonitor(every_n_steps=2, dirpath=tmp_path, predicted=predicted)
    train(ZOO["mlp"].build(), ZOO["mlp"].loader(), steps=4, callbacks=[monitor])
    saved = json.loads((tmp_path / "memory_report.json").read_text())
    assert saved["peak_bytes"] == max(sample.peak_bytes for sample in monitor.history)
    page = (tmp_path / "memory_report.html").read_text()
    assert "Predicted peak (predicted) against measured" in page
    assert "<td>0</td>" not in page and '<td class="text">2</td>' in page
    assert "net.0" in page


def test_a_missing_matplotlib_costs_the_picture_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match=r"lightning-memopt\[plot\]"):
        train(ZOO["mlp"].build(), ZOO["mlp"].loader(), steps=2, callbacks=[MemoryMonitor(dirpath=tmp_path)])
    assert names_in(tmp_path) == REPORT_FILES - {"memory_timeline.png"}


def test_ctrl_c_ends_the_measurement_and_leaves_the_report(tmp_path):
    monitor = MemoryMonitor(every_n_steps=3, dirpath=tmp_path)
    with pytest.raises(SystemExit):
        train(ZOO["mlp"].build(), ZOO["mlp"].loader(), callbacks=[monitor, Raising(KeyboardInterrupt())])
    assert sampled_steps(monitor) == [0, 1]
    assert names_in(tmp_path) == REPORT_FILES
    assert _get_current_dispatch_mode_stack() == []


def test_an_error_in_a_sampled_step_goes_on_unchanged_and_ends_the_measurement(tmp_path):
    error = ValueError("the user's own")
    with pytest.raises(ValueError) as caught:
        train(ZOO["mlp"].build(), ZOO["mlp"].loader(), callbacks=[MemoryMonitor(1, tmp_path), Raising(error)])
    assert caught.value is error
    assert _get_current_dispatch_mode_stack() == []
    assert names_in(tmp_path) == REPORT_FILES


def test_after_out_of_memory_the_post_mortem_is_there_and_the_same_error_goes_on(tmp_path):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(ZOO["mlp"].build(), ZOO["mlp"].loader(), callbacks=[MemoryMonitor(1, tmp_path), Raising(error)])
    assert caught.value is error
    assert names_in(tmp_path) == POST_MORTEM_FILES
    found = json.loads((tmp_path / "out_of_memory.json").read_text())
    assert found["requested_bytes"] == 2 * 2**30
    assert {"parameters", "gradients", "optimizer_state"} <= set(found["by_category"])
    assert found["last_report"]["peak_bytes"] > 0


@pytest.mark.parametrize("checks_before", [0, 1])
def test_after_out_of_memory_in_a_validation_its_batches_are_what_to_make_smaller(tmp_path, checks_before):
    class FailsToValidate(MLP):
        def validation_step(self, batch, batch_idx):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 67108864 bytes.")

    trainer = quiet_trainer(1, MemoryMonitor(dirpath=tmp_path), num_sanity_val_steps=checks_before)
    loader = ZOO["mlp"].loader(batches=1)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        trainer.fit(FailsToValidate(0.0), loader, loader)
    named = [each["technique"] for each in json.loads((tmp_path / "out_of_memory.json").read_text())["remedies"]]
    assert named[0] == "Half the batch_size of the validation's DataLoader"
    assert not any(name.startswith("MicroBatching") for name in named)


def test_a_post_mortem_that_cannot_be_written_does_not_hide_the_error(tmp_path):
    class TakeFolder(Callback):
        def on_train_start(self, *args):
            (tmp_path / "report").write_text("in the way")

    with (
        pytest.raises(MemoryError),
        pytest.warns(UserWarning, match="could not write its report: .*(FileExists|NotADirectory)"),
    ):
        train(
            ZOO["mlp"].build(), ZOO["mlp"].loader(),
            callbacks=[MemoryMonitor(dirpath=tmp_path / "report"), TakeFolder(), Raising(MemoryError())],
        )  # fmt: skip


def test_a_report_that_cannot_be_written_does_not_cost_a_training_that_went_well(tmp_path):
    class TakeFolder(Callback):
        def on_train_start(self, *args):
            (tmp_path / "report").write_text("in the way")

    with pytest.warns(UserWarning, match="could not write its report"):
        run = train(
            ZOO["mlp"].build(), ZOO["mlp"].loader(), steps=3,
            callbacks=[MemoryMonitor(dirpath=tmp_path / "report"), TakeFolder()],
        )  # fmt: skip
    assert run.trainer.state.finished


def test_an_error_in_a_later_validation_leaves_the_report_of_the_training_alone(tmp_path):
    class Fail(Callback):
        def on_validation_batch_start(self, *args):
            raise ValueError("later")

    run = train(ZOO["mlp"].build(), ZOO["mlp"].loader(), steps=2, callbacks=[MemoryMonitor(dirpath=tmp_path), Fail()])
    (tmp_path / "memory_report.json").unlink()
    with pytest.raises(ValueError, match="later"):
        run.trainer.validate(run.module, ZOO["mlp"].loader(1))
    assert "memory_report.json" not in names_in(tmp_path)


OUT_OF_MEMORY = """
import resource, sys
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader
from lightning_memopt.callbacks.monitor import MemoryMonitor

class Grows(pl.LightningModule):
    def __init__(self, failing_step):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.Tanh()) for _ in range(8)))
        self.failing_step = failing_step

    def training_step(self, batch, batch_idx):
        return self.blocks(batch.repeat(4000, 1) if batch_idx == self.failing_step else batch).sum()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

class Limit(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 180 * 2**20, resource.RLIM_INFINITY))

for failing_step in (0, 4):
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[MemoryMonitor(100, f"{sys.argv[1]}/{failing_step}"), Limit()],
    )
    try:
        trainer.fit(Grows(failing_step), DataLoader(torch.randn(32, 512), batch_size=4))
    except RuntimeError as error:
        assert "can't allocate memory" in str(error), error
        print("the error went on")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space by RLIMIT_AS")
def test_when_memory_really_runs_out_the_post_mortem_names_the_blocks_that_held_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, str(tmp_path)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.count("the error went on") == 2, done.stdout + done.stderr
    assert "profiler_start" not in done.stderr  # the profiler's library would write through the progress bar
    hidden_states = 4 * 4000 * 512 * 4
    for failing_step in (0, 4):  # one that is sampled and one that is not
        assert names_in(tmp_path / str(failing_step)) == POST_MORTEM_FILES
        found = json.loads((tmp_path / str(failing_step) / "out_of_memory.json").read_text())
        assert found["requested_bytes"] == hidden_states
        assert found["by_category"]["activations"] >= hidden_states
        blocks = [tensor["submodule"] for tensor in found["largest"] if tensor["category"] == "activations"]
        assert "blocks.0.0" in blocks
        assert any(remedy["technique"].startswith("MicroBatching") for remedy in found["remedies"])


def test_a_resumed_run_samples_its_own_first_steps_and_then_the_same_multiples(tmp_path):
    entry = ZOO["mlp"]
    first = pl.Trainer(**QUIET, logger=False, enable_progress_bar=False, max_steps=7)
    first.fit(entry.build(), entry.loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    monitor = MemoryMonitor(every_n_steps=5, dirpath=tmp_path / "report")
    second = pl.Trainer(**QUIET, logger=False, enable_progress_bar=False, max_steps=16, callbacks=[monitor])
    second.fit(entry.build(), entry.loader(), ckpt_path=tmp_path / "last.ckpt")
    assert sampled_steps(monitor) == [7, 8, 10, 15]
    assert monitor.history[0].by_category["optimizer_state"] > 0


def test_a_second_fit_starts_a_new_history(tmp_path):
    monitor = MemoryMonitor(every_n_steps=50, dirpath=tmp_path)
    for _ in range(2):
        train(ZOO["mlp"].build(), ZOO["mlp"].loader(), steps=3, callbacks=[monitor])
        assert sampled_steps(monitor) == [0, 1]


class Checkpointed(pl.LightningModule):
    def __init__(self, recompute):
        super().__init__()
        self.recompute = recompute
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh())
            for _ in range(6)
        )

    def training_step(self, batch, batch_idx):
        for block in self.blocks:
            batch = checkpoint(block, batch, use_reentrant=False) if self.recompute else block(batch)
        return batch.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_what_checkpointing_saves_is_seen(tmp_path):
    activations = []
    for recompute in (False, True):
        monitor = MemoryMonitor(dirpath=tmp_path)
        train(Checkpointed(recompute), DataLoader(torch.randn(1024, 64), 512), steps=2, callbacks=[monitor])
        activations.append(monitor.highest.by_category["activations"])
    assert activations[1] < 0.6 * activations[0]


def test_nothing_is_sampled_when_the_loop_runs_on_fake_tensors(tmp_path):
    monitor = MemoryMonitor(dirpath=tmp_path)
    with FakeTensorMode():
        module = ZOO["mlp"].build()
    trainer = pl.Trainer(**QUIET, logger=False, callbacks=[monitor])
    monitor.on_train_start(trainer, module)
    monitor.on_train_batch_start(trainer, module, None, 0)
    assert _get_current_dispatch_mode_stack() == []


def fit_on_a_rank(folder):
    """Rank 1 trains on larger samples than rank 0; what the monitor and the folder hold on each."""

    class Share(pl.LightningDataModule):
        def train_dataloader(self):
            rank = torch.distributed.get_rank()
            return DataLoader(torch.randn(12, 64 * (1 + 3 * rank), 64), batch_size=4)

    monitor = MemoryMonitor(dirpath=folder)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, callbacks=[monitor],
    )  # fmt: skip
    trainer.fit(Checkpointed(recompute=False), datamodule=Share())
    trainer.strategy.barrier()
    return [max(s.peak_bytes for s in monitor.history), (folder / "memory_report.html").read_text()]


@pytest.mark.distributed
def test_the_report_says_the_highest_peak_of_all_ranks(tmp_path):
    (first_peak, page), (second_peak, _) = run_on_ranks(fit_on_a_rank, 2, tmp_path / "report")
    assert second_peak > first_peak
    expected = f"Highest peak of all ranks: {format_bytes(second_peak)} (rank 0: {format_bytes(first_peak)}, rank 1:"
    assert expected in page


@pytest.mark.parametrize("every", [0, -3, 2.5, "often"])
def test_a_distance_that_is_no_positive_integer_is_refused(every):
    with pytest.raises(MisconfigurationException, match=r"every_n_steps=.*integer of at least 1"):
        MemoryMonitor(every_n_steps=every)


def test_a_folder_that_is_a_file_or_elsewhere_or_a_prediction_that_is_none_is_refused(tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("")
    for path in (taken, taken / "below"):
        with pytest.raises(MisconfigurationException, match="taken' is a file"):
            MemoryMonitor(dirpath=path)
    with pytest.raises(MisconfigurationException, match="not a folder of this machine"):
        MemoryMonitor(dirpath="s3://bucket/report")
    with pytest.raises(MisconfigurationException, match="was given a dict"):
        MemoryMonitor(predicted={})


def test_nothing_is_written_under_fast_dev_run(tmp_path):
    monitor = MemoryMonitor(dirpath=tmp_path / "report")
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, fast_dev_run=2, callbacks=[monitor], default_root_dir=tmp_path,
        enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(ZOO["mlp"].build(), ZOO["mlp"].loader())
    assert len(monitor.history) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_profiler_of_pytorchs_beside_it_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(MisconfigurationException, match="the trainer has a PyTorchProfiler"):
        train(ZOO["mlp"].build(), ZOO["mlp"].loader(), steps=1, callbacks=[MemoryMonitor()], profiler="pytorch")
