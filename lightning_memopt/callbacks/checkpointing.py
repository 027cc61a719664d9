"""Activation checkpointing for any LightningModule."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils._python_dispatch import _disable_current_modes
from typing_extensions import override

from lightning_memopt.models.instance_patch import replaced
from lightning_memopt.models.selectors import Selector, as_selectors
from lightning_memopt.techniques.checkpointing import CheckpointHandle, Recompute, checkpoint_activations
from lightning_memopt.techniques.checkpointing.policy import Policy


class ActivationCheckpointing(Callback):
    """Recompute activations in the backward instead of keeping them.

    Gradients, dropout masks, BatchNorm statistics and the ``state_dict`` are those of plain training. Validation and
    other passes without gradients run as they would without the callback, and after ``fit`` every module has its own
    ``forward`` back.

    Args:
        policy: ``"full"`` recomputes each block; ``"every_k"`` leaves every ``k``-th block alone and recomputes the
            others; ``"selective"`` keeps the matrix products and attention results that the backward reads and
            recomputes the rest; ``"budget"`` keeps what saves the most time per byte within ``budget``; ``"auto"`` is
            ``"selective"`` where the model has blocks and ``"full"`` for segments of a plain ``nn.Sequential`` and
            for recurrent layers.
        k: For ``"every_k"``: a number of blocks, at least 2.
        budget: For ``"budget"``: a fraction in (0, 1] of the activation memory of the regions. The first step
            recomputes everything while the regions are profiled; the budget is used from the second on.
        modules: What to recompute: a class, a pattern of qualified names (``"model.layers.*"``), a list of these, or
            None to find the blocks.

    Raises:
        MisconfigurationException: Bad arguments, when made; at fit start, if nothing matches ``modules``, there is
            nothing to recompute, or what is to be recomputed is already (by a second of these callbacks, or by
            ``gradient_checkpointing_enable()`` of a Hugging Face model).

    Source:
        Chen et al. 2016 (https://arxiv.org/abs/1604.06174) for recomputing blocks; Korthikanti et al. 2022
        (https://arxiv.org/abs/2205.05198) for keeping what is costly to recompute.

    Example:
        >>> trainer = pl.Trainer(callbacks=[ActivationCheckpointing("budget", budget=0.4)], logger=False)
    """

    def __init__(
        self,
        policy: Policy = "auto",
        *,
        k: int | None = None,
        budget: float | None = None,
        modules: Selector | Sequence[Selector] | None = None,
    ) -> None:
        try:
            self._recompute = Recompute(policy, k, budget)
            self._modules = None if modules is None else as_selectors(modules)
        except ValueError as error:
            raise MisconfigurationException(f"ActivationCheckpointing: {error}.") from error
        self._handle: CheckpointHandle | None = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        around = partial(_logging_once, [m for m in pl_module.modules() if isinstance(m, pl.LightningModule)])
        try:
            self._handle = checkpoint_activations(pl_module, self._recompute, modules=self._modules, around=around)
        except ValueError as error:
            raise MisconfigurationException(f"ActivationCheckpointing: {error}.") from error

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._remove()

    def __getstate__(self) -> dict[str, Any]:
        # Copies of the callback (spawned processes) start without a patched module.
        return {**self.__dict__, "_handle": None}

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


@contextmanager
def _logging_once(modules: Sequence[pl.LightningModule], is_again: bool) -> Iterator[None]:
    """What a block logs counts once, and is no part of what is computed in it."""
    with ExitStack() as stack:
        for module in modules:
            log = _log_nothing if is_again else partial(_log_apart, module.log)
            stack.enter_context(replaced(module, log=log))
        yield


def _log_nothing(*_: Any, **__: Any) -> None:
    pass


def _log_apart(log: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    with _disable_current_modes():  # private; tried with torch 2.11 to 2.13
        log(*args, **kwargs)
