"""Any LightningModule and one line more: the same training in less memory.

python examples/any_module.py
"""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_memopt as memopt


class Classifier(pl.LightningModule):
    """Nothing here knows of memory."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=6, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.encoder(x).mean(1)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(callbacks: list[pl.Callback]) -> Tensor:
    pl.seed_everything(0, verbose=False)
    module = Classifier()
    data = TensorDataset(torch.randn(64, 32, 64), torch.randint(10, (64,)))
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=16))

    batch = next(iter(DataLoader(data, batch_size=16)))
    report = memopt.measure_memory(module, batch, callbacks=callbacks)
    print(f"{type(callbacks[0]).__name__ if callbacks else 'plain'}: peak {report.peak_bytes / 2**20:.1f} MiB")
    return module.head.weight.detach().clone()


def main() -> None:
    plain = train([])
    checkpointed = train([memopt.ActivationCheckpointing("full")])  # the one line
    print("same weights:", torch.allclose(plain, checkpointed, rtol=1e-5))


if __name__ == "__main__":
    main()
