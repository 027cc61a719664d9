"""How much memory a step will take, and how much less with each technique, before anything is allocated.

python examples/predict_before_training.py
"""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

import lightning_memopt as memopt
from lightning_memopt.memory.report import format_bytes


class Regression(pl.LightningModule):
    def __init__(self, width: int = 512, depth: int = 8) -> None:
        super().__init__()
        blocks = (nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.blocks(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def main() -> None:
    batch = torch.randn(4096, 512)
    choices: dict[str, list[pl.Callback]] = {
        "plain": [],
        "checkpointing": [memopt.ActivationCheckpointing("full")],
        "micro-batches of 512": [memopt.MicroBatching(512)],
        "both": [memopt.ActivationCheckpointing("full"), memopt.MicroBatching(512)],
    }
    for name, callbacks in choices.items():
        report = memopt.predict_memory(Regression(), batch, callbacks=callbacks)
        parts = ", ".join(f"{part} {format_bytes(size)}" for part, size in report.by_category.items() if size)
        print(f"{name}: {format_bytes(report.peak_bytes)} ({parts})")


if __name__ == "__main__":
    main()
