"""Reports, and whatever else callbacks tell, come back from the processes that launchers start."""

import os
import pickle
from multiprocessing import get_context

import lightning.pytorch as pl
import pytest
from torch import nn

from lightning_memopt import (
    ClusterWeights,
    ConstantSparsity,
    GradualPruning,
    PruneOnFitEnd,
    QuantizationAwareTraining,
    QuantizeOnFitEnd,
)
from lightning_memopt.callbacks.reporting import ReportingCallback
from lightning_memopt.compression.report import compression_report
from tests.parity import train
from tests.zoo import ZOO


def _fit(callback, width):
    callback.report = compression_report(nn.Linear(width, width), nn.Linear(width, width).bfloat16())


def _away(function, *arguments):
    process = get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.distributed
def test_the_report_of_each_fit_in_another_process_is_read_once_and_its_file_removed():
    callback = ReportingCallback()
    assert callback.report is None
    for width in (8, 16):
        _away(_fit, callback, width)
        assert list(callback._mailbox.folder.iterdir())
        assert callback.report.bytes_after == width * (width + 1) * 2
        assert callback.report is callback.report and not list(callback._mailbox.folder.iterdir())


def test_the_report_of_this_process_is_kept_here():
    callback = ReportingCallback()
    _fit(callback, 4)
    assert callback.report.ratio == 0.5 and not callback._mailbox.folder.exists()


@pytest.mark.parametrize(
    ("callback", "what"),
    [
        (QuantizeOnFitEnd("int8"), {"quantized", "refusal", "report"}),
        (PruneOnFitEnd(0.5), {"pruned", "refusal", "report"}),
        (GradualPruning(ConstantSparsity(0.5)), {"report", "sparsity"}),
        (ClusterWeights(4), {"report"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_an_earlier_fit_told_is_forgotten_when_the_next_is_set_up_and_not_taken_for_its_result(callback, what):
    before = {name: getattr(callback, name) for name in what}
    for name in what:
        setattr(callback, name, "of an earlier fit")
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[callback])
    callback.setup(trainer, ZOO["mlp"].build(), "fit")
    assert {name: getattr(callback, name) for name in what} == before


@pytest.mark.distributed
def test_what_was_never_asked_for_is_gone_with_the_callback_and_its_folder_is_nobody_elses_until_then():
    callback = ReportingCallback()
    _away(_fit, callback, 4)
    folder = callback._mailbox.folder
    assert folder.stat().st_mode & 0o777 == 0o700
    del callback
    assert not folder.exists()


@pytest.mark.distributed
def test_a_callback_that_another_process_made_reports_to_that_one_alone():
    def fit():
        callback = ReportingCallback()
        _fit(callback, 4)
        assert callback.report is not None and not callback._mailbox.folder.exists()

    _away(fit)


@pytest.mark.distributed
def test_a_module_that_cannot_be_pickled_is_said_to_have_stayed_and_the_report_comes_back():
    class Local(nn.Linear):
        pass

    def fit(callback):
        _fit(callback, 4)
        callback.quantized = Local(2, 2)

    callback = QuantizeOnFitEnd()
    _away(fit, callback)
    assert callback.report is not None
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"'quantized' stayed in the process .*Local'\)\. .* export_path"):
            _ = callback.quantized


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a file another user's")
def test_a_folder_of_another_user_is_not_read():
    callback = ReportingCallback()
    callback._mailbox.folder.mkdir()
    (callback._mailbox.folder / "report").write_bytes(pickle.dumps("anything"))
    os.chown(callback._mailbox.folder, 12345, 12345)
    with pytest.raises(RuntimeError, match="belongs to another user"):
        _ = callback.report


def test_all_callbacks_that_report_do_so_this_way():
    for cls in (ClusterWeights, GradualPruning, PruneOnFitEnd, QuantizeOnFitEnd):
        assert issubclass(cls, ReportingCallback)


@pytest.mark.parametrize(
    "callback",
    [
        PruneOnFitEnd(0.5),
        PruneOnFitEnd(0.5, "n:m"),
        GradualPruning(ConstantSparsity(0.5, begin_step=1)),
        ClusterWeights(4),
        ClusterWeights(4, begin_step=1),
        QuantizationAwareTraining("int8"),
    ],
)
def test_reports_have_latencies_at_one_sample_and_at_all_where_there_is_an_example(callback):
    module = ZOO["mlp"].build()
    module.example_input_array = ZOO["mlp"].batch()[0]
    train(module, ZOO["mlp"].loader(2), steps=2, callbacks=[callback])
    assert [one.batch_size for one in callback.report.latency] == [1, len(module.example_input_array)]
    assert all(one.before_seconds > 0 and one.after_seconds > 0 for one in callback.report.latency)
