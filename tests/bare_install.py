"""Run by test_bare_install.py in a process of its own: what works where no optional library is installed.

Hides the libraries from the import system, so that looking for one finds nothing, and prints as JSON how each of the
uses below went: ``null``, or the error's type and message.
"""

import importlib.machinery
import json
import sys
from collections.abc import Callable
from typing import Any

OPTIONAL = {
    "torchao", "bitsandbytes", "torch_pruning", "transformers", "matplotlib", "onnx", "onnxscript", "onnxruntime",
    "onnx_ir", "executorch", "scipy", "sklearn", "psutil",
}  # fmt: skip


class _WithoutOptional:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        found = importlib.machinery.PathFinder.find_spec
        return None if name.partition(".")[0] in OPTIONAL else found(name, path, target)


sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = _WithoutOptional

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import lightning_memopt as memopt  # noqa: E402


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(4)))
        self.head = nn.Linear(64, 4)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.net(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


BATCH = (torch.ones(8, 64), torch.zeros(8, dtype=torch.long))
LAYER, ROW = nn.Linear(4, 4), (torch.ones(1, 4),)


def fit(*callbacks: Any, **options: Any) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader([BATCH, BATCH], batch_size=None))


USES: dict[str, Callable[[], Any]] = {
    "every public name": lambda: [getattr(memopt, name) for name in memopt.__all__],
    "predict_memory": lambda: memopt.predict_memory(Module(), BATCH),
    "measure_memory": lambda: memopt.measure_memory(Module(), BATCH),
    "plan": lambda: memopt.plan(Module(), BATCH, budget="1GiB"),
    "chunked_cross_entropy": lambda: memopt.chunked_cross_entropy(
        torch.ones(2, 4), LAYER.weight, torch.tensor([1, 2])
    ),
    "GradientAccumulation": lambda: fit(memopt.GradientAccumulation(2)),
    "MicroBatching": lambda: fit(memopt.MicroBatching(2)),
    "ActivationCheckpointing": lambda: fit(memopt.ActivationCheckpointing("selective")),
    "ActivationOffload": lambda: fit(memopt.ActivationOffload(to="disk")),
    "OptimizerInBackward": lambda: fit(memopt.OptimizerInBackward()),
    "LowBitOptimizer of 8 bits": lambda: fit(memopt.LowBitOptimizer(8)),
    "LowBitOptimizer of 4 bits": lambda: fit(memopt.LowBitOptimizer(4)),
    "LowBitOptimizer of fp8": lambda: fit(memopt.LowBitOptimizer("fp8")),
    "LowBitOptimizer of bitsandbytes": lambda: fit(memopt.LowBitOptimizer(8, engine="bitsandbytes")),
    "LowBitOptimizer of torchao": lambda: fit(memopt.LowBitOptimizer(8, engine="torchao")),
    "MemoryMonitor": lambda: fit(memopt.MemoryMonitor(dirpath="monitor")),
    "MixedPrecision": lambda: fit(plugins=[memopt.MixedPrecision("bf16")]),
    "HalfPrecision": lambda: fit(plugins=[memopt.HalfPrecision("bf16")]),
    "PruneOnFitEnd": lambda: fit(memopt.PruneOnFitEnd(0.5)),
    "QuantizeOnFitEnd": lambda: fit(memopt.QuantizeOnFitEnd("int8")),
    "MemoryReport.plot": lambda: memopt.predict_memory(Module(), BATCH).plot("picture.png"),
    "prune_structured": lambda: memopt.prune_structured(Module().net, 0.5, BATCH[0]),
    "export_onnx": lambda: memopt.export_onnx(LAYER, "layer.onnx", ROW),
    "export_executorch": lambda: memopt.export_executorch(LAYER, "layer.pte", ROW),
}


def outcome(use: Callable[[], Any]) -> list[str] | None:
    try:
        use()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


if __name__ == "__main__":
    outcomes = {name: outcome(use) for name, use in USES.items()}
    loaded = sorted(OPTIONAL & sys.modules.keys())
    print(json.dumps({"outcomes": outcomes, "loaded": loaded}))
