"""Run parts of a benchmark in processes of their own, so that one row's memory, patches or crash touch no other.

On a CPU they are forked: the parent has imported everything and computed nothing, so a worker starts in
milliseconds. With CUDA they have to be spawned.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any


class WorkerError(RuntimeError):
    """A worker raised or died; the message is the last line of its traceback."""


class Worker:
    """A process that runs ``body(connection, *arguments)``; what it sends is received one by one.

    Args:
        body: The function; at module level where the method is ``"spawn"``.
        arguments: For ``body``.
        method: ``"fork"`` or ``"spawn"``.
    """

    def __init__(self, body: Callable[..., None], *arguments: Any, method: str = "fork") -> None:
        context = multiprocessing.get_context(method)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, body, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def send(self, message: Any) -> None:
        """Send the worker a message; one that has died says so when it is to answer."""
        with suppress(BrokenPipeError):
            self._connection.send(message)

    def receive(self, timeout_seconds: float = 600) -> Any:
        """Wait for the worker's next message.

        Raises:
            WorkerError: It raised, died, or said nothing in time.
        """
        if not self._connection.poll(timeout_seconds):
            raise WorkerError(f"no answer in {timeout_seconds:.0f} seconds")
        try:
            kind, value = self._connection.recv()
        except EOFError:
            self._process.join()
            raise WorkerError(f"the process died with exit code {self._process.exitcode}") from None
        if kind == "error":
            raise WorkerError(value)
        return value


def in_worker(body: Callable[..., None], *arguments: Any, method: str = "fork") -> Any:
    """Run ``body`` in a process of its own and return the first thing that it sends."""
    with Worker(body, *arguments, method=method) as worker:
        return worker.receive()


class Channel:
    """The worker's end: sends values and receives messages."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, value: Any) -> None:
        """Send a value to the parent."""
        self._connection.send(("value", value))

    def receive(self) -> Any:
        """Wait for the parent's next message."""
        return self._connection.recv()


def _run(connection: Connection, body: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    try:
        body(Channel(connection), *arguments)
    except BaseException as error:
        if os.environ.get("MEMOPT_BENCHMARK_TRACEBACK"):
            traceback.print_exc()
        connection.send(("error", traceback.format_exception_only(error)[-1].strip()))
