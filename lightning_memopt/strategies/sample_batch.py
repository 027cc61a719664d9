"""A batch of the loader's, before the loop that will iterate over it begins."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_memopt.planning.first_batch import batch_of

_LOOPS = {
    TrainerFn.FITTING: ("fit_loop", "training_step"),
    TrainerFn.VALIDATING: ("validate_loop", "validation_step"),
    TrainerFn.TESTING: ("test_loop", "test_step"),
    TrainerFn.PREDICTING: ("predict_loop", "predict_step"),
}


def sample_batch(trainer: pl.Trainer) -> tuple[str, Any] | None:
    """The name of the step that ``trainer`` is about to run, and a batch like the first one, on the device.

    The loaders are those that the loop will use; neither they nor random states are advanced. ``None`` if there is
    no batch.
    """
    loop_name, step = _LOOPS[trainer.state.fn]  # type: ignore[index]
    loop: Any = getattr(trainer, loop_name)
    loop.setup_data()
    combined = loop._combined_loader
    if combined is None or not combined.flattened:
        return None
    with isolate_rng():
        loaders = combined.iterables if loop_name == "fit_loop" else combined.flattened[0]
        return step, trainer.strategy.batch_to_device(batch_of(loaders), dataloader_idx=0)
