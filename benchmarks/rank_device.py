"""Where the ranks of a parallel benchmark run: each on a GPU of its own, over NCCL, or all on the CPU, over gloo."""

import os
import time

import torch

BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
"""Of ``torch.distributed``, by the kind of device."""


def kind_for(ranks: int) -> str:
    """``"cuda"`` if this machine has as many GPUs as there are ranks, else ``"cpu"``."""
    return "cuda" if torch.cuda.device_count() >= ranks else "cpu"


def device() -> torch.device:
    """This rank's, which is the current one from now on."""
    if kind_for(int(os.environ["WORLD_SIZE"])) == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", torch.cuda.current_device())


def clock() -> float:
    """Seconds, when all that this rank has asked its GPU for is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
