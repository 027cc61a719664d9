"""A training script as a user writes it, for ``torchrun`` and other launchers: resumes from its newest checkpoint.

Usage: ``elastic_training.py STRATEGY FOLDER [--nodes N] [--fail RANK BATCH] [--how FAULT]``. ``FOLDER/losses`` gets a
line ``step loss`` from rank 0 for each batch; with ``--fail`` that rank fails there, in the first run only.
"""

import argparse
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_memopt

STRATEGIES: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: name for name in ("memopt_ddp", "memopt_zero3", "memopt_tp", "memopt_pp")},
    "pipeline_of_replicas": lambda: lightning_memopt.HybridStrategy(pipeline=2, data=-1),
}
"""As a user gives them; what takes arguments gets a row of its own."""

SHARING = {"memopt_pp": 2, "memopt_tp": 2, "pipeline_of_replicas": 2}
"""Ranks that share a batch, of those that have stages or parts."""

BATCHES, EPOCHS = 4, 3


def _raise() -> None:
    raise ValueError("a bad sample")


FAULTS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "raise": _raise,
    "hang": lambda: time.sleep(1000),
    "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM),
}


class Module(pl.LightningModule):
    def __init__(self, folder: Path, fails: tuple[int, int] | None, fault: Callable[[], object]) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)]
        self.layers = nn.Sequential(*blocks, nn.Linear(16, 1))
        self.folder, self.fails, self.fault = folder, fails, fault

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.fails == (self.global_rank, self.global_step) and not (self.folder / "failed").exists():
            (self.folder / "failed").touch()
            self.fault()
        samples, targets = batch
        return nn.functional.mse_loss(self.layers(samples), targets)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs["loss"].detach().clone()
        dist.all_reduce(loss)
        if self.global_rank == 0:
            with (self.folder / "losses").open("a") as file:
                print(self.global_step, float(loss), file=file)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(
    strategy: str,
    folder: Path,
    ranks: int,
    fails: tuple[int, int] | None = None,
    how: str = "kill",
    **options: Any,
) -> None:
    """Train on ``ranks`` in all; ``options`` are the trainer's."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    replicas = ranks // SHARING.get(strategy, 1)
    samples = torch.randn(BATCHES * 4 * replicas, 16)
    loader = DataLoader(TensorDataset(samples, samples.sum(1, keepdim=True)), batch_size=4, shuffle=True)
    trainer = pl.Trainer(
        strategy=STRATEGIES[strategy](),
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=[ModelCheckpoint(folder / "checkpoints", save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(Module(folder, fails, FAULTS[how]), loader, ckpt_path="last")


def read_arguments() -> argparse.Namespace:
    """What launchers and tests give."""
    parser = argparse.ArgumentParser()
    parser.add_argument("strategy", choices=STRATEGIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--fail", type=int, nargs=2)
    parser.add_argument("--how", choices=FAULTS, default="kill")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    ranks = int(os.environ.get("WORLD_SIZE") or os.environ["SLURM_NTASKS"])
    fit(
        arguments.strategy,
        arguments.folder,
        ranks,
        None if arguments.fail is None else tuple(arguments.fail),
        arguments.how,
        devices=ranks // arguments.nodes,
        num_nodes=arguments.nodes,
    )


if __name__ == "__main__":
    main()
