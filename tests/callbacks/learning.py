"""Fits that have something to lose, and a witness that a refusal came in ``setup``; shared by tests of fit ends."""

import lightning.pytorch as pl
import torch

from tests.zoo import ZOO


class Learning(type(ZOO["mlp"].build())):
    """Fits its batches well, so that pruning has something to lose."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def learn(*callbacks, module=None, epochs: int = 5) -> pl.Trainer:
    entry = ZOO["mlp"]
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module or Learning(0.0), entry.loader(20), entry.loader(4))
    return trainer


class NotEvenStarted(pl.Callback):
    def on_fit_start(self, *args):
        raise AssertionError("it was not refused in setup")
