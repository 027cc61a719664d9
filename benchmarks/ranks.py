"""A group of ranks that works as one: told to go together, timed by the slowest."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from rank_device import kind_for
from workers import Channel, Worker


class RankGroup:
    """Processes that run ``body(channel, *arguments)`` on each rank of one process group.

    Args:
        body: The function; it reads its rank from the environment, or leaves that to a Trainer.
        arguments: For ``body``.
        ranks: How many processes.
        method: ``"fork"`` or ``"spawn"``; by default what the device allows, which CUDA's driver does not for a fork.
    """

    def __init__(self, body: Callable[..., None], *arguments: Any, ranks: int, method: str | None = None) -> None:
        port = _free_port()
        method = method or ("spawn" if kind_for(ranks) == "cuda" else "fork")
        self._workers = [Worker(_on_rank, rank, ranks, port, body, arguments, method=method) for rank in range(ranks)]

    def step(self) -> float:
        """Let every rank go once, and return the seconds of the slowest."""
        return max(self.ask("go"))

    def ask(self, message: Any) -> list[Any]:
        """Send every rank a message and return each one's answer."""
        for worker in self._workers:
            worker.send(message)
        return self.receive()

    def receive(self) -> list[Any]:
        """The next thing that each rank sends."""
        return [worker.receive() for worker in self._workers]

    def __enter__(self) -> "RankGroup":
        return self

    def __exit__(self, *exception: Any) -> None:
        for worker in self._workers:
            worker.__exit__(*exception)


def _on_rank(
    channel: Channel, rank: int, ranks: int, port: int, body: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    body(channel, *arguments)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
