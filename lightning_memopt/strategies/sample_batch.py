"""A batch of the loader's, before the loop that will iterate over it begins."""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_memopt.models.instance_patch import replaced
from lightning_memopt.planning.first_batch import batch_of, can_be_indexed
from lightning_memopt.techniques.batches import copied

_LOOPS = {
    TrainerFn.FITTING: ("fit_loop", "training_step"),
    TrainerFn.VALIDATING: ("validate_loop", "validation_step"),
    TrainerFn.TESTING: ("test_loop", "test_step"),
    TrainerFn.PREDICTING: ("predict_loop", "predict_step"),
}


def sample_batch(trainer: pl.Trainer, patches: ExitStack) -> tuple[str, Any] | None:
    """The name of the step that ``trainer`` is about to run, and a batch like the first one, on the device.

    The loaders are those that the loop will use. Of a stream, which may not begin twice, the first batch is taken and
    put back. ``None`` if there is no batch.

    Args:
        trainer: Before its loop runs.
        patches: Where what is changed of the loop is put back when it has run.
    """
    loop_name, step = _LOOPS[trainer.state.fn]  # type: ignore[index]
    loop: Any = getattr(trainer, loop_name)
    loop.setup_data()
    combined = loop._combined_loader
    if combined is None or not combined.flattened:
        return None
    is_fit = loop_name == "fit_loop"
    if is_fit and combined._mode == "sequential":  # with which Lightning refuses to train, when the loop runs
        return None
    if all(can_be_indexed(loader) for loader in (combined.flattened if is_fit else combined.flattened[:1])):
        with isolate_rng():
            batch = batch_of(combined.iterables if is_fit else combined.flattened[0])
    else:
        try:
            batch = _peek_in_fit(loop._data_fetcher) if is_fit else _peek_in_evaluation(loop, patches)
        except StopIteration:
            return None
        batch = copied(batch)  # hooks and the step may change it, and it is to be used again
    with isolate_rng():
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch)
        return step, trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _peek_in_fit(fetcher: Any) -> Any:
    """The first batch of a fetcher, which has begun to iterate and may have fetched it already."""
    if getattr(fetcher, "batches", None):
        return fetcher.batches[0][0]
    first = next(fetcher.iterator)
    fetcher.iterator = chain([first], fetcher.iterator)
    return first[0]


def _peek_in_evaluation(loop: Any, patches: ExitStack) -> Any:
    loader, *others = loop._combined_loader.flattened
    batches = iter(loader)
    first = next(batches)
    loop._combined_loader.flattened = [_Begun(loader, chain([first], batches)), *others]
    # The loop would ask for the loaders once more, and get the one from which a batch is taken.
    patches.enter_context(replaced(loop, setup_data=lambda: None))
    return first


class _Begun:
    """A loader of which the first pass has begun; its attributes are the loader's."""

    def __init__(self, loader: Any, batches: Iterator[Any]) -> None:
        self._loader = loader
        self._batches: Iterator[Any] | None = batches

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # while it is copied
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        batches, self._batches = self._batches, None
        return iter(self._loader) if batches is None else batches
