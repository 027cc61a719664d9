"""Time collectives between two processes of this machine; each of them runs this file."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_memopt.planning.devices import CollectiveKind, Link

_SIZES = (2**12, 2**16, 2**20, 2**24)
_KINDS: tuple[CollectiveKind, ...] = (
    *("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send"),
)
_DEADLINE = 120.0
_NETWORK = Link(2e-4, 1.25e8)
"""Between nodes, which one machine cannot measure: an Ethernet of 1 Gbit/s."""


def measure_links() -> Mapping[str, Link]:
    """The links of this machine: NCCL between two of its GPUs, or gloo between two processes on its CPU.

    Raises:
        ValueError: The processes did not end well; the message has what they said.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting, results = Path(folder, "meeting"), Path(folder, "results.json")
        command = [sys.executable, "-m", __name__, str(meeting), str(results)]
        ranks = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        end = time.monotonic() + _DEADLINE
        try:
            said = [rank.communicate(timeout=max(end - time.monotonic(), 0.1))[1] for rank in ranks]
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"two processes did not finish their collectives within {_DEADLINE:.0f} s") from error
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        if any(rank.returncode for rank in ranks) or not results.exists():
            raise ValueError(f"two processes cannot communicate: {' '.join(''.join(said).split())[-500:]}")
        measured = json.loads(results.read_text(encoding="utf-8"))
    points = {kind: tuple((int(size), float(seconds)) for size, seconds in rows) for kind, rows in measured.items()}
    (_, latency), *_, (size, seconds) = points["send"]
    return {"intra": Link(latency, size / seconds, points), "inter": _NETWORK}


def _run_rank(meeting: str, results: str, rank: int) -> None:
    is_gpu = torch.cuda.device_count() >= 2
    device = torch.device("cuda", rank) if is_gpu else torch.device("cpu")
    torch.set_num_threads(max((os.cpu_count() or 2) // 2, 1))
    dist.init_process_group("nccl" if is_gpu else "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    measured = {kind: [(size, _seconds(kind, size, rank, device)) for size in _SIZES] for kind in _KINDS}
    dist.destroy_process_group()
    if rank == 0:
        Path(results).write_text(json.dumps(measured), encoding="utf-8")


def _seconds(kind: CollectiveKind, size_bytes: int, rank: int, device: torch.device) -> float:
    """The quickest of a few; both ranks do as many."""
    whole = torch.ones(size_bytes // 4, device=device)
    half = whole[: len(whole) // 2].clone()
    other = torch.empty_like(whole)
    best = float("inf")
    for _ in range(20 if size_bytes <= 2**20 else 6):
        dist.barrier()
        begin = time.perf_counter()
        _run(kind, whole, half, other, rank)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


def _run(kind: CollectiveKind, whole: torch.Tensor, half: torch.Tensor, other: torch.Tensor, rank: int) -> Any:
    if kind == "all_reduce":
        dist.all_reduce(whole)
    elif kind == "all_gather":
        dist.all_gather_into_tensor(other, half)
    elif kind == "reduce_scatter":
        dist.reduce_scatter_tensor(half, whole)
    elif kind == "all_to_all":
        dist.all_to_all_single(other, whole)
    elif kind == "broadcast":
        dist.broadcast(whole, src=0)
    elif rank == 0:
        dist.send(whole, dst=1)
        dist.recv(half[:1], src=1)  # a send ends when its buffer is free, which is before it arrived
    else:
        dist.recv(whole, src=0)
        dist.send(half[:1], dst=0)


if __name__ == "__main__":
    _run_rank(sys.argv[1], sys.argv[2], int(sys.argv[3]))
