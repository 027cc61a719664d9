"""Reports come back from the processes that launchers start."""

from multiprocessing import get_context

import pytest
from torch import nn

from lightning_memopt import ClusterWeights, GradualPruning, PruneOnFitEnd, QuantizeOnFitEnd
from lightning_memopt.callbacks.reporting import ReportingCallback
from lightning_memopt.compression.report import compression_report


def _fit(callback, width):
    callback.report = compression_report(nn.Linear(width, width), nn.Linear(width, width).bfloat16())


@pytest.mark.distributed
def test_the_report_of_each_fit_in_another_process_is_read_once_and_its_file_removed():
    callback = ReportingCallback()
    assert callback.report is None
    for width in (8, 16):
        process = get_context("fork").Process(target=_fit, args=(callback, width))
        process.start()
        process.join(60)
        assert callback._mailbox.exists()
        assert callback.report.bytes_after == width * (width + 1) * 2
        assert callback.report is callback.report and not callback._mailbox.exists()


def test_the_report_of_this_process_is_kept_here():
    callback = ReportingCallback()
    _fit(callback, 4)
    assert callback.report.ratio == 0.5 and not callback._mailbox.exists()


def test_all_callbacks_that_report_do_so_this_way():
    for cls in (ClusterWeights, GradualPruning, PruneOnFitEnd, QuantizeOnFitEnd):
        assert issubclass(cls, ReportingCallback)
