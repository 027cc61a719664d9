"""Run a function on several ranks: forked processes on this machine, with a deadline.

Each rank has the environment that a launcher would give it, so a ``Trainer(devices=world_size)`` made inside the
function treats its processes as launched from outside, and stock and own strategies run unmodified over gloo.
"""

import faulthandler
import multiprocessing
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

_FORK = multiprocessing.get_context("fork")


class RankFailed(AssertionError):
    """A rank raised, died or did not finish; the message names it and carries its traceback."""


@dataclass
class _Rank:
    number: int
    process: BaseProcess
    connection: Connection


def run_on_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, deadline_seconds: float = 60
) -> list[Any]:
    """Call ``function(*args)`` in ``world_size`` forked processes and return what each rank returned.

    Return plain Python values or numpy arrays: they travel through a pipe. Forking makes closures and objects of the
    test visible to the ranks, but what a rank changes stays in it.

    Args:
        function: Called on each rank; it reads its rank from the environment, or leaves that to the Trainer.
        world_size: How many ranks.
        *args: Passed to ``function``.
        deadline_seconds: From the start of the first rank to the last one's return value.

    Raises:
        RuntimeError: This is a worker of pytest-xdist, see the marker ``distributed``.
        RankFailed: A rank raised, died, or was still running at the deadline. No rank is left behind.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        raise RuntimeError(
            f"{os.environ['PYTEST_CURRENT_TEST']} forks ranks in a worker of pytest-xdist, where other tests may "
            "have started threads; mark it `@pytest.mark.distributed`, and run what is marked so without `-n`"
        )
    port = _free_port()
    ranks = [_start(function, args, number, world_size, port, deadline_seconds) for number in range(world_size)]
    try:
        return _collect(ranks, time.monotonic() + deadline_seconds, deadline_seconds)
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.join()
            rank.connection.close()


def _start(
    function: Callable[..., Any], args: tuple[Any, ...], number: int, world_size: int, port: int, deadline: float
) -> _Rank:
    ours, theirs = _FORK.Pipe()
    environment = {
        "LOCAL_RANK": str(number),
        "RANK": str(number),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    process = _FORK.Process(target=_rank_main, args=(function, args, environment, theirs, deadline), daemon=True)
    process.start()
    theirs.close()  # so that the pipe reads as closed when the rank dies
    return _Rank(number, process, ours)


def _rank_main(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    environment: dict[str, str],
    connection: Connection,
    deadline: float,
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    faulthandler.enable()  # on this rank's stderr, which the test's report shows, if a signal ends it
    faulthandler.dump_traceback_later(0.9 * deadline)  # where a hanging rank hangs, on its stderr
    _end_after(deadline + 5)  # if the parent was killed and cannot
    try:
        message = (True, function(*args))
    except BaseException:
        message = (False, traceback.format_exc())
    try:
        connection.send(message)
    except Exception:  # the value cannot be pickled
        connection.send((False, traceback.format_exc()))
    # Rank 0 hosts the store and all ranks hold sockets of their peers: stay until the parent has every value.
    connection.recv()


def _end_after(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, [1])
    timer.daemon = True
    timer.start()


def _collect(ranks: list[_Rank], end: float, deadline_seconds: float) -> list[Any]:
    values: dict[int, Any] = {}
    pending = {rank.connection: rank for rank in ranks}
    while pending:
        ready = wait(list(pending), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            running = ", ".join(str(rank.number) for rank in pending.values())
            raise RankFailed(f"rank {running} of {len(ranks)} still running after {deadline_seconds} s")
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = pending.pop(connection)
            values[rank.number] = _receive(rank)
    return [values[number] for number in range(len(ranks))]


def _receive(rank: _Rank) -> Any:
    try:
        succeeded, value = rank.connection.recv()
    except (EOFError, ConnectionResetError):
        rank.process.join()
        code = rank.process.exitcode or 0
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise RankFailed(f"rank {rank.number} died without returning: {cause}") from None
    if not succeeded:
        raise RankFailed(f"rank {rank.number} raised\n{value}")
    return value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
