"""SIGTERM, as a scheduler sends it to one rank or to all: every rank stops after the same batch."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_memopt.models.instance_patch import replaced


@contextmanager
def stopping_together(trainer: pl.Trainer) -> Iterator[None]:
    """Within the block a SIGTERM to any rank ends training on all of them before the next batch.

    Lightning (2.6) broadcasts in the signal handler, wherever the rank is between its other collectives, and its
    peers take that for one of those: they hang, or train on the wrong numbers. Here the handler only makes a note,
    and the ranks compare notes where Lightning asks rank 0 for its own: once a batch, with one collective in place
    of another.

    Enter it before the trainer registers its handlers.
    """
    connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
    is_noted = False

    def note(signum: int, _: FrameType | None) -> None:
        nonlocal is_noted
        launcher = trainer.strategy.launcher
        if not is_noted and launcher is not None:
            launcher.kill(signal.Signals(signum))  # the ranks that this one started
        is_noted = True

    def compare_notes() -> None:
        notes = torch.tensor((dist.get_rank() + 1) * is_noted, device=trainer.strategy.root_device)
        dist.all_reduce(notes, dist.ReduceOp.MAX)
        if notes:
            connector.received_sigterm = True
            # With a sentence, a SystemExit is no success: what restarts or reports on the job has to see that.
            raise SIGTERMException(
                f"Rank {int(notes) - 1} received SIGTERM: all ranks stop before batch {loop.batch_idx + 1}. Resume "
                "from the newest checkpoint with `ckpt_path='last'`."
            )

    with replaced(connector, _sigterm_notifier_fn=note), replaced(loop, _broadcast_sigterm_tensor=compare_notes):
        yield
