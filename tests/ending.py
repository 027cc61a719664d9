"""How ranks end when one of them fails: what each raised or wrote before its process ended."""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tests.distributed import _free_port

_FORK = get_context("fork")


@dataclass
class Ending:
    """How one rank ended.

    Attributes:
        code: Its process's exit code, ``-n`` for signal ``n``; ``None``: it still ran at the deadline.
        said: What it wrote to stderr, the traceback of an error that it raised among it.
    """

    code: int | None
    said: str

    def failed_with(self, *parts: str) -> bool:
        """Whether it ended by itself, not in success, and said all of ``parts``."""
        return self.code is not None and self.code > 0 and all(part in self.said for part in parts)


def end_of_ranks(function: Callable[[], object], world_size: int, deadline_seconds: float) -> list[Ending]:
    """Run ``function`` on ``world_size`` forked ranks to their ends, whatever these are, and say how they ended.

    As :func:`tests.distributed.run_on_ranks`, but a rank that fails is no failure here, and its process ends when
    ``function`` does. At the deadline, and once all others have ended, what still runs is killed.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(world_size)]
        ranks = [
            _FORK.Process(target=_rank_main, args=(function, rank, world_size, port, outputs[rank]), daemon=True)
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.start()
        try:
            end = time.monotonic() + deadline_seconds
            while any(rank.is_alive() and not _is_stopped(rank.pid) for rank in ranks) and time.monotonic() < end:
                time.sleep(0.05)
            codes = [rank.exitcode for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        return [Ending(code, output.read_text()) for code, output in zip(codes, outputs, strict=True)]


def _is_stopped(process: Any) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def _rank_main(function: Callable[[], object], rank: int, world_size: int, port: int, output: Path) -> None:
    os.environ.update(
        LOCAL_RANK=str(rank),
        RANK=str(rank),
        NODE_RANK="0",
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    function()
