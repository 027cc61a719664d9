"""Run a function on several ranks that talk over gloo, with a deadline.

A fresh interpreter forks the ranks: the tests' own process has threads by then, and must not be forked.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def run_ranks(target: str, directory: Path, *, ranks: int = 2, deadline: float = 90) -> list[Any]:
    """Call ``target`` (``"package.module:function"``, no arguments) on each rank; what each returned, as from JSON.

    Past the deadline (seconds) all ranks are killed and ``TimeoutError`` raised; a rank's error is raised with its
    text.
    """
    command = [sys.executable, "-m", "tests.ranks", target, str(ranks), str(directory)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parent.parent
    process = subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise TimeoutError(f"{target} on {ranks} ranks took more than {deadline} s:\n{output[-4000:]}") from None
    if process.returncode:
        raise RuntimeError(f"{target} on {ranks} ranks failed:\n{output[-8000:]}")
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(ranks)]


def _rank(rank: int, target: str, directory: str) -> None:
    import torch

    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    module, function = target.split(":")
    result = getattr(import_module(module), function)()
    Path(directory, f"{rank}.json").write_text(json.dumps(result))


def _main(target: str, ranks: int, directory: str) -> None:
    from torch.multiprocessing import start_processes

    import_module(target.split(":")[0])  # once, before the fork
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    start_processes(_rank, args=(target, directory), nprocs=ranks, start_method="fork")


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
