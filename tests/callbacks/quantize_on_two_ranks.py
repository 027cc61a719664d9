"""What the tests of QuantizeOnFitEnd run on each of two ranks."""

from pathlib import Path

import lightning.pytorch as pl
import torch

from lightning_memopt import QuantizeOnFitEnd
from tests.callbacks.classifier import Classifier, signs_loader


def quantize(strategy: str, folder: Path) -> tuple[list[float], float, list[float]]:
    """The quantized layer, the metric after, and the layer of the original, as this rank has them."""
    torch.manual_seed(0)
    module = Classifier()
    callback = QuantizeOnFitEnd(
        "int8_static", max_metric_drop=0.2, monitor="val_accuracy", calibration_batches=2, export_path=folder / "net"
    )
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, signs_loader(), signs_loader(1))
    weight = callback.quantized.net[2].weight
    values = [*weight.dequantize().flatten().tolist(), weight.inputs]
    return values, callback.report.metrics_after["val_accuracy"], module.net[2].weight.flatten().tolist()


def quantize_by_export(folder: Path) -> list[float]:
    """What the copy on this rank computes."""
    torch.manual_seed(0)
    callback = QuantizeOnFitEnd("int8_static", engine="torchao", calibration_batches=2, export_path=folder / "net")
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(Classifier(), signs_loader(), signs_loader(1))
    return callback.quantized(torch.ones(3, 16)).flatten().tolist()
