"""Figure 3 of the planner: what other estimators say of the peak of a step, against what was measured.

    pip install accelerate deepspeed    # either may be missing; its column is then empty
    PYTHONPATH=. python benchmarks/planner_others.py
    PYTHONPATH=. python benchmarks/planner_others.py --models mlp --out F    # does it run?

``accelerate estimate-memory`` counts four times the parameters for training with Adam, DeepSpeed's estimators count
the states of the model under ZeRO: neither looks at a batch. All are asked about one process without offload.
Lightning's ``BatchSizeFinder`` looks for the largest batch by running steps until one has no memory left: here it may
take ``--room`` times the peak of a step, in a process that gets no more; the planner is asked how to train on the
same room with the batch that the finder ended with, and the one above it.
"""

import argparse
import importlib
import multiprocessing
import resource
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from environment import environment_record, now
from lightning.pytorch.callbacks import BatchSizeFinder
from results_file import ResultsFile
from torch.utils.data import DataLoader

import lightning_memopt as memopt
from lightning_memopt.planning.device_cache import this_device
from tests.zoo import ZOO

RESULTS = Path(__file__).parent / "results" / "planner_others.json"
MOST_SAMPLES = 8192
MODELS = ("mlp", "encoder", "gpt2", "llama", "bert_qa", "cnn", "vit")


def by_accelerate(module: Any) -> int | None:
    """What ``accelerate estimate-memory`` prints as "Training using Adam", in float32."""
    try:
        sizes = importlib.import_module("accelerate.utils").calculate_maximum_sizes
    except ImportError:
        return None
    return 4 * sizes(module)[0]


def by_deepspeed(module: Any) -> int | None:
    """What DeepSpeed's estimator of ZeRO 2 says of the device."""
    try:
        estimator = importlib.import_module("deepspeed.runtime.zero.stage_1_and_2")
    except ImportError:
        return None
    parameters = sum(parameter.numel() for parameter in module.parameters())
    _, device_bytes = estimator.estimate_zero2_model_states_mem_needs(parameters, 1, 1, cpu_offload=False)
    return int(device_bytes)


class Sized(pl.LightningDataModule):
    """Batches of a module of the zoo, as many samples in each as the finder says."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.batch_size = 2

    def train_dataloader(self) -> DataLoader:
        return DataLoader([ZOO[self.name].batch(self.batch_size)] * MOST_SAMPLES, batch_size=None)


class CountingFinder(BatchSizeFinder):
    """Counts trial runs: the loop is reset before each."""

    trials = 0

    def scale_batch_size(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reset = trainer.fit_loop.epoch_loop.reset

        def counted() -> None:
            self.trials += 1
            reset()

        trainer.fit_loop.epoch_loop.reset = counted  # type: ignore[method-assign]
        super().scale_batch_size(trainer, pl_module)


def find_batch_size(name: str, room_bytes: int) -> dict[str, Any]:
    """What the finder ends with where so much may be allocated; for a process of its own."""
    module, finder = ZOO[name].build(), CountingFinder(max_trials=12)
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[finder],
    )  # fmt: skip
    held_pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (held_pages * resource.getpagesize() + room_bytes,) * 2)
    begin = time.process_time()
    trainer.fit(module, datamodule=Sized(name))
    return {
        "batch_size": finder.optimal_batch_size,
        "trials": finder.trials,
        "seconds": time.process_time() - begin,
    }


def search_by_trial(name: str, measured: int, room: float) -> dict[str, Any]:
    """The finder's trials against the planner's predictions, in processor seconds."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(find_batch_size, (name, int(measured * room)))
    device, batch_size = this_device(), found["batch_size"]
    begin = time.process_time()
    plans = {
        samples: memopt.plan(
            ZOO[name].build(), ZOO[name].batch(samples), budget=int(measured * room), device=device, wanted=1
        ).best
        for samples in (batch_size, 2 * batch_size)
    }
    planned = {str(samples): None if plan is None else str(plan.choice.techniques) for samples, plan in plans.items()}
    return {"finder": found, "planner": {"seconds": time.process_time() - begin, "plans": planned}}


def compare(name: str, batch_size: int, room: float) -> dict[str, Any]:
    """Bytes by estimator, and the error of each; and what the search for a batch size takes."""
    entry = ZOO[name]
    batch = entry.batch(batch_size)
    measured = memopt.measure_memory(entry.build(), batch).peak_bytes
    said = {
        "lightning_memopt": memopt.predict_memory(entry.build(), batch).peak_bytes,
        "accelerate": by_accelerate(entry.build()),
        "deepspeed": by_deepspeed(entry.build()),
    }
    errors = {one: count / measured - 1 for one, count in said.items() if count is not None}
    return {
        "measured_bytes": measured,
        "estimated_bytes": said,
        "error": errors,
        "search": search_by_trial(name, measured, room),
        "measured_at": now(),
    }


def versions() -> dict[str, str]:
    """Of the other estimators that are here."""
    found = {}
    for package in ("accelerate", "deepspeed"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--room", type=float, default=4.0, help="times the peak that the finder may take")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    workload = {"batch_size": options.batch_size, "room": options.room}
    header = {"environment": environment_record(), "versions": versions(), "workload": workload}
    results = ResultsFile(options.out, header)
    for name in options.models:
        results.add(name, compare(name, options.batch_size, options.room), list(MODELS))
        print(name, {one: f"{error:+.1%}" for one, error in results.rows[name]["error"].items()}, flush=True)


if __name__ == "__main__":
    main()
