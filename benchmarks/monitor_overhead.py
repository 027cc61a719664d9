"""What MemoryMonitor costs on the steps that it does not sample, as a ratio to the same step without it.

    python benchmarks/monitor_overhead.py             # about 5 minutes on 2 cores
    python benchmarks/monitor_overhead.py --pairs 20  # does it run?

How the ratio is taken is said in ``paired.py``, but in processor time and on one thread: what the monitor costs is
Python that runs, and processor time does not count what other programs take from the machine. Progress bars are on,
because the figure that the monitor shows there is part of its cost. Beside it stand a second plain run, which says
how far noise reaches, and a callback that does nothing, which says what Lightning spends on any callback.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import workload
from environment import environment_record, now
from paired import TakeTurns, compare_steps
from workers import Channel, Worker

import lightning_memopt as memopt

RESULTS = Path(__file__).parent / "results" / "monitor_overhead.json"
SIZES = {
    "smallest": workload.Size(layers=1, width=16, heads=1, context=8, batch_size=2, vocabulary=64),
    "small": workload.Size(layers=2, width=64, heads=2, context=64, batch_size=4, vocabulary=256),
}
"""``smallest`` is a step of Lightning's own overhead and little else: the worst case for a cost per step."""

CALLBACKS: dict[str, Callable[[], list[pl.Callback]]] = {
    "plain again": list,
    "callback that does nothing": lambda: [pl.Callback()],
    "monitor": lambda: [memopt.MemoryMonitor(NEVER_AGAIN, tempfile.mkdtemp())],
}

WARM_UP = 4  # the monitor samples the first two
NEVER_AGAIN = 10**9
ALLOWED = 1.03


class CountProcessorTime(TakeTurns):
    """Takes turns and reports processor seconds."""

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Report, and wait for the next turn."""
        self.channel.send(time.process_time() - self._since)
        self._wait()

    def _wait(self) -> None:
        self.channel.receive()
        self._since = time.process_time()


class Run:
    """A run that takes one step each time it is told to."""

    def __init__(self, size: workload.Size, callbacks: Callable[[], list[pl.Callback]]) -> None:
        self._worker = Worker(train, size, callbacks)
        for _ in range(WARM_UP):
            self.step()

    def step(self) -> float:
        """Train one step and return its seconds."""
        self._worker.send("go")
        return self._worker.receive()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._worker.__exit__(*exception)


def train(channel: Channel, size: workload.Size, callbacks: Callable[[], list[pl.Callback]]) -> None:
    """Body of a worker: trains for as long as it is asked to, its progress bar going nowhere."""
    workload.be_quiet()
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    options = {"callbacks": [*callbacks(), CountProcessorTime(channel)], "enable_progress_bar": True}
    workload.trainer(**options).fit(size.build(), workload.loader(size.batch()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=400, help="pairs of neighbouring steps (default: 400)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file")
    options = parser.parse_args()
    workload.preload()
    rows: dict[str, Any] = {}
    for size_name, size in SIZES.items():
        rows[size_name] = {"size": asdict(size)}
        for name, callbacks in CALLBACKS.items():
            with Run(size, list) as plain, Run(size, callbacks) as other:
                found = compare_steps(plain, other, options.pairs)
            rows[size_name][name] = asdict(found)
            print(f"{size_name}, {name}: {found.ratio:.4f} of {found.plain_seconds * 1e3:.1f} ms", flush=True)
    header = {
        "environment": environment_record(),
        "measured_at": now(),
        "clock": "processor time",
        "allowed_ratio": ALLOWED,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(header | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
