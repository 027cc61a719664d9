"""Ranks that watch over each other while they train, and end with an error that names the one that failed."""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_memopt.parallel.watch import RankWatch
from lightning_memopt.strategies.saving import SavingStrategy


class WatchedStrategy(SavingStrategy):
    """Tells a :class:`~lightning_memopt.parallel.watch.RankWatch` what its rank does, and raises what that finds.

    Args:
        silent_seconds: A rank whose process gives no sign of life for so long has failed, and all ranks end with an
            error that names it. So has one that lives, but computes, reads and writes nothing for one and a half
            times as long while all others wait for it.
        stuck_seconds: Likewise for a rank that works and that all others have waited for for so long; ``None``: only
            when ``timeout`` ends a collective, since a long validation on one rank looks the same.
        **options: What :class:`~lightning_memopt.strategies.saving.SavingStrategy` takes.
    """

    def __init__(self, *, silent_seconds: float = 30, stuck_seconds: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._failed = False
        self._batch: int | None = None
        self._watch = RankWatch(silent_seconds, stuck_seconds, idle_seconds=1.5 * silent_seconds)

    @override
    def setup_environment(self) -> None:
        if (
            os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0"
        ):
            # https://github.com/pytorch/pytorch/issues/135712: the addresses of the processes before are still there.
            rank_zero_warn(
                "torchrun shares its store with the ranks, and restarted ones find each other's old addresses in it: "
                "the restart fails to connect. Run torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 set."
            )
        super().setup_environment()
        self._watch.start()

    @override
    def teardown(self) -> None:
        super().teardown()
        self._watch.stop()

    # What a rank does

    @override
    def backward(self, closure_loss: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._enter("backward", self._batch)
        return super().backward(closure_loss, *args, **kwargs)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        def then_step() -> Any:
            result = closure()
            self._enter("optimizer step", self._batch)
            return result

        result = super().optimizer_step(optimizer, then_step, *args, **kwargs)
        self._enter("what follows the optimizer step", self._batch)
        return result

    def _enter(self, phase: str, batch: int | None) -> None:
        self._batch = batch
        self._watch.enter(phase if batch is None else f"{phase} of batch {batch}")

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        self._watch.enter(f"saving of {filepath}")
        super().save_checkpoint(checkpoint, filepath, storage_options)
        self._watch.enter("what follows saving a checkpoint")

    # Where one fails

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        self._failed = True
        failure = self._watch.explain(exception)
        if failure is not None:
            self._take_down()
            raise failure from exception

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self._refuse_to_save_after_failure()
        return super().lightning_module_state_dict()

    def _refuse_to_save_after_failure(self) -> None:
        """``ModelCheckpoint(save_on_exception=True)`` saves before Lightning tells its strategy of the exception."""
        if self.world_size == 1 or not dist.is_initialized():  # as in the process that forked the ranks
            return
        assert self.lightning_module is not None
        error = sys.exception()
        if self.lightning_module.trainer.state.status != TrainerStatus.INTERRUPTED:
            return
        if not isinstance(error, Exception) or isinstance(error, SIGTERMException):  # on which all ranks stop alike
            return
        print(
            f"[rank {self.global_rank}] no checkpoint is saved on {type(error).__name__}: all ranks save together, "
            "and where one failed the others may be anywhere. The newest one saved before it is whole.",
            file=sys.stderr,
        )
        self.on_exception(error)
        self._take_down()
        raise error

    def _take_down(self) -> None:
        """What Lightning does after its hook ``on_exception``, which is not left in the usual way."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        for logger in trainer.loggers:
            logger.finalize("failed")
        trainer._teardown()
        trainer.state.stage = None
