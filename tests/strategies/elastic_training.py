"""A training script as a user writes it, for ``torchrun`` and other launchers: resumes from its newest checkpoint.

Usage: ``elastic_training.py STRATEGY FOLDER [--nodes N] [--kill RANK BATCH]``. ``FOLDER/losses`` gets a line
``step loss`` from rank 0 for each batch; with ``--kill`` that rank kills itself there, in the first run only.
"""

import argparse
import os
import signal
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


class Module(pl.LightningModule):
    def __init__(self, folder: Path, kill: tuple[int, int] | None) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)]
        self.layers = nn.Sequential(*blocks, nn.Linear(16, 1))
        self.folder, self.kill = folder, kill

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.kill == (self.global_rank, self.global_step) and not (self.folder / "killed").exists():
            (self.folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("strategy", choices=STRATEGIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--kill", type=int, nargs=2)
    arguments = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE") or os.environ["SLURM_NTASKS"])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    replicas = ranks // SHARING.get(arguments.strategy, 1)
    samples = torch.randn(BATCHES * 4 * replicas, 16)
    loader = DataLoader(TensorDataset(samples, samples.sum(1, keepdim=True)), batch_size=4, shuffle=True)
    trainer = pl.Trainer(
        strategy=STRATEGIES[arguments.strategy](),
        accelerator="cpu",
        devices=ranks // arguments.nodes,
        num_nodes=arguments.nodes,
        max_epochs=EPOCHS,
        callbacks=[ModelCheckpoint(arguments.folder / "checkpoints", save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    kill = None if arguments.kill is None else tuple(arguments.kill)
    trainer.fit(Module(arguments.folder, kill), loader, ckpt_path="last")


if __name__ == "__main__":
    main()
