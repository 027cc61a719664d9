"""Whether this process does anything: what it and its children compute, read and write."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

from lightning_memopt.parallel.stack import Line

_COMPUTES = 0.01
"""The share of a window that a process may compute for and be idle: threads of libraries look around in it."""

_MOVES_BYTES = 1 << 20
"""What it may read and write meanwhile."""

_DEBUGGERS = ("bdb.py", "pdb.py", "pydevd.py")


class Idleness:
    """For how long this process has done nothing worth mentioning, on a system with ``/proc``.

    A rank that the others wait for may compute, compile, read a slow disk, or wait for a worker or a subprocess that
    does: all that is work. One in a lock, in a sleep or before a file system that is gone does none.

    Args:
        window: Seconds. What is done in so many may be a hundredth of them.

    Example:
        >>> Idleness(window=45).seconds() < 45
        True
    """

    def __init__(self, window: float) -> None:
        self.window = window
        self.begin()

    def begin(self) -> None:
        """Count from now on."""
        self._since, self._done = time.monotonic(), _work_done()

    def seconds(self) -> float:
        """Since it last worked, but for what the calling thread does; 0.0 where that cannot be known."""
        done = _work_done()
        if done is None or self._done is None:
            return 0.0
        computed, moved = done[0] - self._done[0], done[1] - self._done[1]
        if computed > _COMPUTES * self.window or moved > _MOVES_BYTES:
            self.begin()
        return time.monotonic() - self._since


def is_debugged(stack: Iterable[Line]) -> bool:
    """Whether a thread at these lines is held by a debugger, that is by a person who thinks."""
    return any(os.path.basename(line.file) in _DEBUGGERS for line in stack)


def _work_done() -> tuple[float, int] | None:
    """Processor seconds and bytes read and written, of this process and its descendants, without this thread's."""
    try:
        processes = [os.getpid(), *_descendants(os.getpid())]
        seconds = sum(map(_processor_seconds, processes)) - time.thread_time()
        moved = sum(_bytes_moved(Path(f"/proc/{process}/io")) for process in processes)
        return seconds, moved - _bytes_moved(Path("/proc/thread-self/io"))
    except OSError:  # another system, or a child that ended while it was read
        return None


def _descendants(process: int) -> list[int]:
    # A child is listed with the thread that started it.
    found = [
        int(child)
        for thread in Path(f"/proc/{process}/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]
    return found + [below for child in found for below in _descendants(child)]


def _processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # its own and that of children it has reaped


def _bytes_moved(file: Path) -> int:
    counted = dict(line.split(": ") for line in file.read_text().splitlines())
    return int(counted["rchar"]) + int(counted["wchar"])
