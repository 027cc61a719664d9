"""How large a batch fits, asked of Lightning's BatchSizeFinder and of a prediction: half of the planner's figure 3.

    python benchmarks/planner_batch_size.py                  # minutes on 2 cores
    python benchmarks/planner_batch_size.py --only mlp       # one row, measured again
    python benchmarks/planner_batch_size.py --quick --out F  # does it run?

Six modules of some size, with 96 MiB for a step. ``BatchSizeFinder`` (binary search, no margin)
trains until memory runs out, which the limit of a process's address space makes it do; what oneDNN says then is taken
for it too, in its favour. The prediction halves its way
to the largest batch whose ``predict_memory`` fits, and what that batch takes is then measured. Each row is run in a
process of its own; seconds are of the processor.
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from environment import environment_record, now
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.tuner import batch_size_scaling
from options import Options, open_results
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from planner_modules import SIZED

import lightning_memopt as memopt
from lightning_memopt.models.out_of_memory import is_out_of_memory

RESULTS = Path(__file__).parent / "results" / "planner_batch_size.json"
START, MOST = 16, 8192
BUDGET = 96 * 2**20
"""Bytes that a step may take."""


class Samples(Dataset):
    """The samples of a batch over and over."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return MOST

    def __getitem__(self, index: int) -> Any:
        return tree_map(lambda part: part[index % len(part)], self._batch)


class Data(pl.LightningDataModule):
    """A module's samples in batches of a size that may change."""

    def __init__(self, name: str, batch_size: int) -> None:
        super().__init__()
        self._batch, self.batch_size = SIZED[name].batch(), batch_size

    def batch(self, size: int) -> Any:
        """The first ``size`` samples."""
        return tree_map(lambda part: part[torch.arange(size) % len(part)], self._batch)

    def train_dataloader(self) -> DataLoader:
        """Enough for batches of ``MOST``."""
        return DataLoader(Samples(self._batch), batch_size=self.batch_size)

    def val_dataloader(self) -> list[Any]:
        """None: only training is looked at."""
        return []


def by_training(name: str) -> dict[str, Any]:
    """What BatchSizeFinder finds within ``BUDGET``, and how often it trained to find it."""
    data, trials = Data(name, START), []
    run = batch_size_scaling._try_loop_run

    def counted(*args: Any, **kwargs: Any) -> Any:
        trials.append(data.batch_size)
        return run(*args, **kwargs)

    batch_size_scaling._try_loop_run = counted
    batch_size_scaling.is_oom_error = is_out_of_memory
    finder = BatchSizeFinder(mode="binsearch", init_val=START, margin=0.0)
    with tempfile.TemporaryDirectory() as folder:
        _fit(SIZED[name].build(), Data(name, 2), folder)  # what is loaded and kept once is not the step's
        module = SIZED[name].build()
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        parameters = sum(parameter.nbytes for parameter in module.parameters())
        begin = time.process_time()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + BUDGET - parameters, resource.RLIM_INFINITY))
        try:
            _fit(module, data, folder, finder)
        except RuntimeError as error:  # of the training that follows the search
            if not is_out_of_memory(error):
                raise
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {
        "batch_size": finder.optimal_batch_size,
        "seconds": time.process_time() - begin,
        "trials": len(trials),
        "ran_out": sum(size > finder.optimal_batch_size for size in trials),
    }


def by_prediction(name: str) -> dict[str, Any]:
    """The largest batch whose predicted step fits ``BUDGET``."""
    data, predictions = Data(name, START), 0
    begin = time.process_time()
    fits, too_many = 0, MOST
    size = START
    while too_many - fits > 1:
        predictions += 1
        if memopt.predict_memory(SIZED[name].build(), data.batch(size)).peak_bytes <= BUDGET:
            fits = size
        else:
            too_many = size
        size = 2 * size if too_many == MOST else (fits + too_many) // 2
    return {"batch_size": fits, "seconds": time.process_time() - begin, "predictions": predictions}


def compare(name: str) -> dict[str, Any]:
    """One row; for a process of its own."""
    torch.set_num_threads(1)
    data, predicted, found = Data(name, START), by_prediction(name), by_training(name)
    for answer in (predicted, found):
        peak = memopt.measure_memory(SIZED[name].build(), data.batch(answer["batch_size"])).peak_bytes
        answer["of_budget"] = peak / BUDGET
    return {"batch_size_finder": found, "predict_memory": predicted, "measured_at": now()}


def _fit(module: pl.LightningModule, data: pl.LightningDataModule, folder: str, *callbacks: pl.Callback) -> None:
    pl.Trainer(
        max_steps=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, callbacks=[*callbacks],
    ).fit(module, datamodule=data)  # fmt: skip


def main() -> None:
    options = Options(__doc__, RESULTS, list(SIZED)).parse()
    header = {"environment": environment_record(), "quick": options.quick, "budget_bytes": BUDGET}
    results = open_results(options.out, header)
    for name in options.only or (["mlp"] if options.quick else SIZED):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results.add(name, pool.apply(compare, (name,)), list(SIZED))
        print(name, results.rows[name], flush=True)


if __name__ == "__main__":
    main()
