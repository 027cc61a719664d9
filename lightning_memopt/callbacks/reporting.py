"""A report that comes back from the processes that a launcher spawns or forks."""

import tempfile
from multiprocessing import parent_process
from pathlib import Path
from uuid import uuid4

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from lightning_memopt.compression.report import CompressionReport


class ReportingCallback(Callback):
    """A callback with a ``report`` of what it did to the module, ``None`` before.

    Lightning's launchers that spawn or fork bring weights and metrics back from their processes and no attributes of
    callbacks. So rank 0 of them leaves the report in a file, which the process that started them reads and removes.
    """

    def __init__(self) -> None:
        self._report: CompressionReport | None = None
        self._mailbox = Path(tempfile.gettempdir(), f"lightning_memopt_{uuid4().hex}.json")

    @property
    def report(self) -> CompressionReport | None:
        """What the callback did to the module; ``None`` before."""
        if parent_process() is None and self._mailbox.exists():
            self._report = CompressionReport.from_json(self._mailbox.read_text())
            self._mailbox.unlink()
        return self._report

    @report.setter
    def report(self, report: CompressionReport) -> None:
        self._report = report
        if parent_process() is not None and rank_zero_only.rank == 0:
            self._mailbox.write_text(report.to_json())
