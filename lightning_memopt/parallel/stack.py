"""Where another thread is, read without a Python object of its frames."""

import faulthandler
import os
import re
import tempfile
from typing import IO, NamedTuple

_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")
_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')


class Line(NamedTuple):
    """A line of code that a thread is at."""

    file: str
    number: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number} in {self.function}"


def stack_of(thread: int) -> list[Line]:
    """The lines that the thread ``thread`` is at, the innermost first; none where it has ended.

    ``sys._current_frames()`` gives the same as objects, and making one may collect garbage, whose finalizers may let
    the other thread run on and free what is being read: in Python 3.11 the process ends with SIGSEGV. What writes
    the traceback of a crash allocates nothing.

    Args:
        thread: What ``threading.get_ident()`` gives in it.
    """
    with _file_in_memory() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = file.read().decode()
    lines: list[Line] = []
    is_asked = False
    for written in text.splitlines():
        if found := _THREAD.match(written):
            is_asked = int(found[1], 16) == thread
        elif is_asked and (found := _FRAME.match(written)):
            lines.append(Line(found[1], int(found[2]), found[3]))
    return lines


def _file_in_memory() -> IO[bytes]:
    """A file that a full disk does not keep from being written, where the system has such."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("stack"), "w+b")  # the file closes the descriptor
    return tempfile.TemporaryFile()
