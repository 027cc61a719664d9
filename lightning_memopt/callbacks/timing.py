"""Latencies for the report of a callback, where the module has something to time it on."""

import lightning.pytorch as pl
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn

from lightning_memopt.compression.latency import Latency, compare_latencies
from lightning_memopt.models.example import count_samples


def has_example(module: pl.LightningModule) -> bool:
    """Whether there is something to time ``module`` on: samples as ``example_input_array``."""
    return count_samples(module.example_input_array) > 0


def time_example(trainer: pl.Trainer, before: pl.LightningModule, after: pl.LightningModule) -> tuple[Latency, ...]:
    """Time both, not compiled, on ``before.example_input_array`` and on its first sample, where it has samples."""
    if not has_example(before):
        return ()
    precision = trainer.precision_plugin
    inputs = precision.convert_input(move_data_to_device(before.example_input_array, before.device))
    try:
        with precision.forward_context():
            return compare_latencies(before, after, inputs)
    except Exception as error:  # of the user's forward, on a slice that it may not take: no reason to lose a result
        rank_zero_warn(f"No latency was measured: {type(error).__name__} on a part of `example_input_array`: {error}")
        return ()
