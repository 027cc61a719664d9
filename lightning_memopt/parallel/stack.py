"""Where another thread is."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Line(NamedTuple):
    """A line of code that a thread is at."""

    file: str
    number: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number} in {self.function}"


def stack_of(thread: int) -> list[Line]:
    """The lines that the thread ``thread`` is at, the innermost first; none where it has ended.

    What its functions hold stays alive until they are read, so look at threads that stay where they are.
    ``faulthandler.dump_traceback`` would hold nothing, and in Python 3.13 ends the process if the other thread is
    just leaving a function that was called from C.

    Args:
        thread: What ``threading.get_ident()`` gives in it.
    """
    lines = []
    with _no_collection():
        frame = sys._current_frames().get(thread)
        while frame is not None:
            lines.append(Line(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            frame = frame.f_back
    return lines


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect no garbage meanwhile: Python 3.11 may, while it makes the object of a frame that another thread is in.

    Finalizers let that thread run, and leave the frame, of which then is read what is freed: the process ends with
    SIGSEGV.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
