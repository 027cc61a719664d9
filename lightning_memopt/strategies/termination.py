"""SIGTERM, ``trainer.should_stop`` and ``-1``, on one rank or on all: every rank stops after the same batch."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_memopt.models.instance_patch import replaced


@contextmanager
def stopping_together(trainer: pl.Trainer) -> Iterator[None]:
    """Within the block a SIGTERM to any rank, or ``should_stop`` on any, ends training on all after the same batch.

    Lightning (2.6) broadcasts in the signal handler, wherever the rank is between its other collectives, and its
    peers take that for one of those: they hang, or train on the wrong numbers. Here the handler only makes a note,
    and the ranks compare notes once a batch, with one collective in place of the one by which Lightning asks rank 0
    for its own. Of ``should_stop`` Lightning asks nobody: where one rank sets it (its part of the validation was good
    enough) that rank leaves, and the others wait for it. So it is with an epoch that ``on_train_batch_start`` ends by
    returning -1: ranks ask each other about it where the module has such a hook.

    Enter it before the trainer registers its handlers.
    """
    if trainer.world_size == 1:
        yield  # with nobody to agree with, Lightning's own handler does it all
        return
    connector, fit_loop = trainer._signal_connector, trainer.fit_loop
    loop, validation = fit_loop.epoch_loop, fit_loop.epoch_loop.val_loop
    is_noted = False
    received: int | None = None  # as compared last: 0, or one more than the number of a rank that received SIGTERM

    def note(signum: int, _: FrameType | None) -> None:
        nonlocal is_noted
        launcher = trainer.strategy.launcher
        if not is_noted and launcher is not None:
            launcher.kill(signal.Signals(signum))  # the ranks that this one started
        is_noted = True

    def compare_notes() -> None:
        nonlocal received
        own = [(dist.get_rank() + 1) * is_noted, trainer.should_stop]
        notes = torch.tensor(own, dtype=torch.long, device=trainer.strategy.root_device)
        dist.all_reduce(notes, dist.ReduceOp.MAX)
        received, stops = notes.tolist()
        trainer.should_stop = bool(stops)

    def stop_where_received() -> None:
        if received is None:  # before the first batch
            compare_notes()
        if received:
            connector.received_sigterm = True
            # With a sentence, a SystemExit is no success: what restarts or reports on the job has to see that.
            raise SIGTERMException(
                f"Rank {received - 1} received SIGTERM: all ranks stop before batch {loop.batch_idx + 1}. Resume "
                "from the newest checkpoint with `ckpt_path='last'`."
            )

    def compared_before(hook: Callable[..., Any]) -> Callable[..., Any]:
        def compares(*args: Any) -> Any:
            compare_notes()
            return hook(*args)

        return compares

    def compared_after(hook: Callable[..., Any]) -> Callable[..., Any]:
        def compares(*args: Any) -> Any:
            result = hook(*args)
            compare_notes()
            return result

        return compares

    module = trainer.lightning_module
    own_hook = module.on_train_batch_start

    def end_epoch_together(batch: Any, batch_idx: int) -> int | None:
        ends = own_hook(batch, batch_idx) == -1
        return -1 if trainer.strategy.reduce_boolean_decision(ends, all=False) else None

    # Each asks next whether training goes on: the end of a batch, whether it validates first.
    hooks = {"on_train_batch_start": end_epoch_together} if is_overridden("on_train_batch_start", module) else {}
    with (
        replaced(connector, _sigterm_notifier_fn=note),
        replaced(module, **hooks),
        replaced(
            loop,
            _broadcast_sigterm_tensor=stop_where_received,
            on_advance_end=compared_before(loop.on_advance_end),
        ),
        replaced(validation, run=compared_after(validation.run)),
        replaced(
            fit_loop,
            run=compared_before(fit_loop.run),
            on_run_start=compared_after(fit_loop.on_run_start),
            on_advance_start=compared_after(fit_loop.on_advance_start),
            on_advance_end=compared_after(fit_loop.on_advance_end),
        ),
    ):
        yield
