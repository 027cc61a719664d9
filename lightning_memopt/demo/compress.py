"""Prune and quantize what the demo trained, write it, read it back, and validate what was read."""

import copy
from pathlib import Path

import lightning_memopt as memopt
from lightning_memopt.compression.container import save_compressed
from lightning_memopt.compression.recipe import Recipe
from lightning_memopt.compression.report import CompressionReport, compression_report
from lightning_memopt.demo.data import Corpus
from lightning_memopt.demo.model import GPT
from lightning_memopt.demo.presets import Preset
from lightning_memopt.demo.run import Outcome, validate
from lightning_memopt.planning.quiet import quiet_lightning

RECIPE = {"prune": {"amount": 0.5}, "quantize": "int8"}
"""Half of the weights to zero, and the rest in 8 bits; without training any further."""

FOLDER = "compressed"


def compress(outcome: Outcome, preset: Preset, corpus: Corpus, *, seed: int, folder: Path) -> CompressionReport:
    """Compress the module of ``outcome``, which is left as it is.

    Args:
        outcome: Of a run that has trained.
        preset: Size of the model and of the data.
        corpus: The text.
        seed: Seed of the batches.
        folder: Gets a folder ``compressed`` that :func:`~lightning_memopt.load_compressed` reads.
    """
    with quiet_lightning():
        smaller = copy.deepcopy(outcome.module)
        applied = Recipe.from_dict(RECIPE).apply(smaller)
        path = save_compressed(smaller, folder / FOLDER)
        loaded = memopt.load_compressed(path)
        assert isinstance(loaded, GPT)
        return compression_report(
            outcome.module,
            loaded,
            skipped=applied.skipped,
            eligible_sparsity=applied.eligible_sparsity,
            metrics_before={"val_loss": outcome.validation_loss},
            metrics_after={"val_loss": validate(loaded, preset, corpus, seed)},
            export_path=path,
        )
