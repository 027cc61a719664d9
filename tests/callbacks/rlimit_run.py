"""Train with the address space limited, in a process of its own (``test_micro_batching_out_of_memory``).

The last line written is JSON: what three runs came to.
"""

import json
import resource
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

from lightning_memopt import MicroBatching

LAYERS = 16
VALUES = 2**17  # a sample has 512 KiB, and its activations LAYERS times that


class Wide(pl.LightningModule):
    """Saves an activation as large as the batch in each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.linspace(0.5, 1.5, LAYERS))
        self.norm = nn.BatchNorm1d(1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        hidden = batch
        for scale in self.scales:
            hidden = torch.tanh(hidden * scale)
        self.norm(hidden.mean(1, keepdim=True).detach())  # statistics, which a failed attempt must not leave behind
        return (nn.functional.dropout(hidden[:, :64], 0.5) - 0.1).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class LimitAddressSpace(Callback):
    """Within training there are so many bytes more than were in use at the start of the first."""

    def __init__(self, extra_bytes: int) -> None:
        self.extra_bytes = extra_bytes
        self.limit: int | None = None

    def on_train_start(self, trainer: Any, module: Any) -> None:
        if self.limit is None:
            in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            self.limit = in_use + self.extra_bytes
        resource.setrlimit(resource.RLIMIT_AS, (self.limit, resource.RLIM_INFINITY))

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class RecordLosses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


def run(size: int | str, *callbacks: Callback) -> dict[str, Any]:
    torch.manual_seed(0)
    batches = list(torch.randn(1, 16, VALUES))
    module, micro, record = Wide(), MicroBatching(size), RecordLosses()  # type: ignore[arg-type]
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1, callbacks=[*callbacks, micro, record],
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))
    weights = {name: weight.flatten().tolist() for name, weight in module.state_dict().items()}
    return {"losses": record.losses, "weights": weights, "size": micro.size}


def main() -> None:
    torch.set_num_threads(1)
    limited = LimitAddressSpace(120 * 2**20)  # the activations of the whole batch alone are 128 MiB
    results: dict[str, Any] = {"auto, limited": run("auto", limited)}
    try:
        run(16, limited)
    except RuntimeError as error:
        results["whole batch, limited"] = str(error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    results["unlimited"] = run(results["auto, limited"]["size"])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
