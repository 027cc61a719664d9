"""A batch of the loader's, before the loop that will iterate over it begins."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset

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


def batch_of(loaders: Any) -> Any:
    """A batch like the first that ``loaders`` (a loader, or a collection of them) will give."""
    return tree_map(_first, loaders, is_leaf=_is_loader)


def _is_loader(item: Any) -> bool:
    return hasattr(item, "__iter__") and not isinstance(item, list | tuple | dict)


def _first(loader: Any) -> Any:
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset) and loader.batch_size:
        count = min(loader.batch_size, len(loader.dataset))  # type: ignore[arg-type]
        return loader.collate_fn([loader.dataset[index] for index in range(count)])
    return next(iter(loader))
