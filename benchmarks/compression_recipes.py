"""Ways of making a trained module small: ours, with the issue's targets, and those of other libraries."""

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from compression_tasks import Task
from pt2e_graph import by_export
from torch import nn

from lightning_memopt import GradualPruning, PolynomialSparsity
from lightning_memopt.compression.container import save_compressed
from lightning_memopt.compression.quantize import quantize
from lightning_memopt.compression.ranges import observe_inputs
from lightning_memopt.compression.sizes import measure_sizes
from lightning_memopt.compression.structured import prune_structured

SHARE = 0.8
"""Of zeros, in all recipes that make zeros."""


@dataclass
class Outcome:
    """What a recipe made.

    Attributes:
        module: The small module.
        disk_bytes: What it takes on disk, in the form in which its library saves it.
        notes: Figures of the recipe's own.
    """

    module: pl.LightningModule
    disk_bytes: int
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A way of making a module small.

    Attributes:
        title: As the table names it.
        run: Makes a small module of a trained one, which it leaves alone.
        is_ours: Not another library's.
        tasks: Where it can be tried; ``None``: all.
        is_compiled: Speed is measured of both under ``torch.compile``.
        is_frozen: With the small one's weights as constants, without which its kernels are not used.
        size_target: Largest share of the bytes on disk, or ``None``.
        drop_target: Largest drop in points of accuracy.
        perplexity_target: Largest rise in percent, where it is another number.
        speed_target: Smallest speedup at a batch of 32.
    """

    title: str
    run: Callable[[Task, pl.LightningModule], Outcome]
    is_ours: bool = True
    tasks: tuple[str, ...] | None = None
    is_compiled: bool = False
    is_frozen: bool = False
    size_target: float | None = None
    drop_target: float | None = None
    perplexity_target: float | None = None
    speed_target: float | None = None


def _exported(module: pl.LightningModule, **notes: Any) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        path = save_compressed(module, Path(folder) / "out")
        return Outcome(module, sum(file.stat().st_size for file in path.iterdir()), notes)


def _pickled(module: pl.LightningModule, **notes: Any) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.pt"
        torch.save(module.state_dict(), path)
        return Outcome(module, path.stat().st_size, notes)


def _static(task: Task, module: pl.LightningModule) -> Outcome:
    return _exported(_calibrated(task, task.copy(module)))


def _calibrated(task: Task, module: pl.LightningModule) -> pl.LightningModule:
    module.eval()
    with observe_inputs(module) as ranges, torch.no_grad():
        for inputs in task.calibration():
            module(inputs)
    quantize(module, "int8_static", input_ranges=ranges)
    return module


def _pt2e(task: Task, module: pl.LightningModule) -> Outcome:
    module = task.copy(module).eval()
    dynamic = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    module.net = by_export(module.net, task.batch(32), task.calibration(), dynamic)
    return _pickled(module)


def _quantized(scheme: Any) -> Callable[[Task, pl.LightningModule], Outcome]:
    def run(task: Task, module: pl.LightningModule) -> Outcome:
        module = task.copy(module)
        quantize(module, scheme)
        return _exported(module)

    return run


def _gradual(task: Task, module: pl.LightningModule) -> Outcome:
    module = task.copy(module)
    steps = len(task.loaders()[0]) * task.finetune_epochs
    schedule = PolynomialSparsity(0.0, SHARE, begin_step=0, end_step=steps * 2 // 3, frequency=max(steps // 50, 1))
    callback = GradualPruning(schedule, scope="global", embeddings=True)
    task.fit(module, task.finetune_epochs, [callback])
    return _exported(module, sparsity=callback.sparsity)


def _structured(task: Task, module: pl.LightningModule) -> Outcome:
    return _exported(_shrunk(task, module))


def _structured_int8(task: Task, module: pl.LightningModule) -> Outcome:
    return _exported(_calibrated(task, _shrunk(task, module)))


def _shrunk(task: Task, module: pl.LightningModule) -> pl.LightningModule:
    module = task.copy(module)
    found = prune_structured(module, 0.5, lambda module: module(task.batch(2)))
    assert found.parameters_after < found.parameters_before
    task.fit(module, task.finetune_epochs)
    return module


def _lightning_pruning(task: Task, module: pl.LightningModule) -> Outcome:
    """``ModelPruning`` once, then a resume of the run: is what was pruned still zero?"""
    from lightning.pytorch.callbacks import ModelPruning

    module = task.copy(module)
    dense = _bytes(module)
    callback = ModelPruning("l1_unstructured", amount=SHARE, apply_pruning=lambda epoch: epoch == 0)
    held = []
    watch = pl.callbacks.LambdaCallback(on_train_epoch_end=lambda *_: held.append(_bytes(module)))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = task.fit(module, task.finetune_epochs, [callback, watch])
        path = Path(folder) / "run.ckpt"
        trainer.save_checkpoint(path)
        resumed = task.build()
        again = pl.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, max_epochs=task.finetune_epochs + 1, limit_val_batches=0,
            callbacks=[ModelPruning("l1_unstructured", amount=SHARE, apply_pruning=False)],
        )  # fmt: skip
        again.fit(resumed, task.loaders()[0], ckpt_path=path, weights_only=False)
    return _pickled(
        module,
        training_memory_ratio=max(held) / dense,
        sparsity=_zeros(module),
        sparsity_after_resume=_zeros(resumed),
    )


def _torch_prune(task: Task, module: pl.LightningModule) -> Outcome:
    from torch.nn.utils import prune

    module = task.copy(module)
    dense = _bytes(module)
    places = [(child, "weight") for child in module.modules() if isinstance(child, nn.Linear | nn.Conv2d)]
    prune.global_unstructured(places, prune.L1Unstructured, amount=SHARE)
    ratio = _bytes(module) / dense
    task.fit(module, task.finetune_epochs)
    for child, name in places:
        prune.remove(child, name)
    return _pickled(module, training_memory_ratio=ratio, sparsity=_zeros(module))


def _torch_pruning(task: Task, module: pl.LightningModule) -> Outcome:
    import torch_pruning

    module = task.copy(module)
    net = module.net if task.is_accuracy else module
    last = net[-1] if isinstance(net, nn.Sequential) else net.head
    pruner = torch_pruning.pruner.BasePruner(
        net, task.batch(2), importance=torch_pruning.importance.GroupMagnitudeImportance(), pruning_ratio=0.5,
        ignored_layers=[last],
    )  # fmt: skip
    pruner.step()
    module(task.batch(2))
    task.fit(module, task.finetune_epochs)
    return _pickled(module)


def _torchao(task: Task, module: pl.LightningModule) -> Outcome:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    module = task.copy(module)
    quantize_(module, Int8WeightOnlyConfig())
    return _pickled(module)


def _bytes(module: nn.Module) -> int:
    return sum(size.bytes for size in measure_sizes(module, packed=False).values())


def _zeros(module: nn.Module) -> float:
    sizes = measure_sizes(module, packed=False).values()
    return sum(size.zeros for size in sizes) / sum(size.weights for size in sizes)


RECIPES = {
    "int8": Recipe(
        "int8, weights only", _quantized("int8_weight_only"), size_target=0.27, drop_target=0.2, perplexity_target=0.5
    ),
    "int8_dynamic": Recipe(
        "int8, inputs too, compiled", _quantized("int8_dynamic"), is_compiled=True, size_target=0.30, drop_target=0.5,
        speed_target=1.5,
    ),
    "int8_static": Recipe(
        "int8, inputs by ranges, compiled", _static, is_compiled=True, size_target=0.30, drop_target=0.5,
        speed_target=1.5,
    ),
    "nf4": Recipe("nf4", _quantized("nf4"), size_target=0.16, drop_target=1.0),
    "gradual": Recipe("80% of the weights, gradually", _gradual, size_target=0.25, drop_target=0.5),
    "structured": Recipe(
        "50% of the structure, fine-tuned", _structured, size_target=0.35, drop_target=1.0, speed_target=1.8
    ),
    "structured_int8": Recipe(
        "50% of the structure and int8, compiled", _structured_int8, is_compiled=True, size_target=0.10,
        drop_target=1.5, speed_target=2.0,
    ),
    "lightning": Recipe("Lightning's ModelPruning, 80%", _lightning_pruning, is_ours=False),
    "torch_prune": Recipe("torch.nn.utils.prune, 80% global", _torch_prune, is_ours=False),
    "torch_pruning": Recipe("torch-pruning, 50%", _torch_pruning, is_ours=False),
    "pt2e": Recipe(
        "torchao's PT2E, int8, compiled and frozen", _pt2e, is_ours=False, tasks=("digits_cnn", "digits_vit"),
        is_compiled=True, is_frozen=True,
    ),
    "torchao": Recipe("torchao, int8 weights only", _torchao, is_ours=False),
}  # fmt: skip
