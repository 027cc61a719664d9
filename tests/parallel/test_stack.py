"""Where another thread is, seen from a thread beside it."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_memopt.parallel.stack import stack_of

# Collects garbage as often as it can, with finalizers that let the other thread run on and free its frames.
_READ_WHILE_CALLS_COME_AND_GO = """
import gc, os, threading, time
from lightning_memopt.parallel.stack import stack_of

class LetsOthersRun:
    def __init__(self):
        self.me = self

    def __del__(self):
        time.sleep(0)

def call(depth):
    return call(depth - 1) if depth else [[] for _ in range(10)]

def read(thread):
    for _ in range(300):
        assert stack_of(thread)
        LetsOthersRun()

gc.set_threshold(3)
reader = threading.Thread(target=read, args=[threading.get_ident()])
reader.start()
while reader.is_alive():
    call(900)
"""


@contextmanager
def _waiting() -> Iterator[int]:
    """A thread that waits in a function of a known name."""
    started, ends = threading.Event(), threading.Event()

    def wait_here() -> None:
        started.set()
        ends.wait()

    thread = threading.Thread(target=wait_here)
    thread.start()
    started.wait()
    assert thread.ident is not None
    try:
        yield thread.ident
    finally:
        ends.set()
        thread.join()


def test_the_stack_of_a_thread_begins_at_the_line_that_it_waits_at():
    with _waiting() as thread:
        names = [line.function for line in stack_of(thread)]
        here = next(line for line in stack_of(thread) if line.function == "wait_here")
    assert names[names.index("wait_here") :] == ["wait_here", "run", "_bootstrap_inner", "_bootstrap"]
    assert here.file == __file__
    line = Path(__file__).read_text().splitlines()[here.number - 1].strip()
    assert line in ("started.set()", "ends.wait()")  # which it may be just about to leave


def test_a_thread_that_has_ended_has_no_stack():
    with _waiting() as thread:
        pass
    assert stack_of(thread) == []


def test_reading_a_running_thread_while_garbage_is_collected_does_not_end_the_process():
    done = subprocess.run(
        [sys.executable, "-c", _READ_WHILE_CALLS_COME_AND_GO], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
