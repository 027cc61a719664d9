"""What a pipeline asks of a trainer and a module before anything is taken apart."""

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.optim import Optimizer

from lightning_memopt.callbacks.micro_batching import MicroBatching
from lightning_memopt.parallel.agreement import find_batch_norms
from lightning_memopt.parallel.pipeline.pipeline import Pipeline


def check_trainer(strategy: str, trainer: pl.Trainer) -> None:
    """Refuse what a pipeline cannot train with.

    Raises:
        MisconfigurationException: Says what, why, and what to do.
    """
    if problem := _find_problem(trainer, trainer.lightning_module):
        raise MisconfigurationException(f"{strategy}: {problem}")


def _find_problem(trainer: pl.Trainer, module: pl.LightningModule) -> str | None:
    name = type(module).__name__
    if not module.automatic_optimization:
        return (
            f"`{name}` optimizes manually (`automatic_optimization = False`), and a pipeline runs forward and "
            "backward of many micro-batches in an order of its own; use `memopt_zero3`."
        )
    if is_overridden("backward", module):
        return (
            f"`{name}` has a `backward` of its own, and a pipeline's backward is that of each stage by itself; scale "
            "the loss in `training_step`, or use `memopt_zero3`."
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        return (
            f"`{name}.training_step(dataloader_iter)` draws its batches itself, and a pipeline cuts each batch into "
            "micro-batches before the step; take `batch` and `batch_idx`, or use `memopt_zero3`."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, MicroBatching):
            return (
                "MicroBatching cannot work here: the pipeline splits batches into micro-batches itself. Leave it "
                "out, and give `microbatches=`."
            )
        if isinstance(callback, StochasticWeightAveraging) and callback.pl_module_contains_batch_norm(module):
            return (
                "StochasticWeightAveraging cannot work here: at its end it has BatchNorm count all batches again, "
                "in a pass without a backward, and a pipeline runs both in one. Use EMAWeightAveraging, which "
                "averages what was counted while training, or `memopt_zero3`."
            )
    return None


def check_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers that join parameters, of which each stage holds its own.

    Raises:
        ValueError: Says which, why, and what to do.
    """
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        raise ValueError(
            "LBFGS makes one vector of all parameters, and each stage holds its own alone; use an optimizer that "
            "treats each element by itself (AdamW, SGD), or `memopt_ddp`."
        )


def warn_of_batch_norm(module: pl.LightningModule) -> None:
    """Say that statistics are those of micro-batches."""
    names = find_batch_norms(module)
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        rank_zero_warn(
            f"`{names[0]}`{more} takes its statistics from the micro-batch instead of the batch, so training "
            "differs from one device with the same batches; GroupNorm or LayerNorm would not."
        )


def warn_of_power_iteration(module: pl.LightningModule) -> None:
    """Say that spectral norms are estimated once for each micro-batch, and so further than once for each batch."""
    names = [
        name.partition(".parametrizations.")[0]
        for name, part in module.named_modules()
        for computes in [part, *part._forward_pre_hooks.values()]
        if isinstance(computes, _SpectralNorm | SpectralNorm)
    ]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        rank_zero_warn(
            f"`{names[0]}`{more} has a spectral norm, whose estimate goes a step on with each micro-batch instead of "
            "each batch, so weights differ from those on one device until it has settled. With `microbatches=1` they "
            "do not."
        )


def warn_of_unseen(pipeline: Pipeline) -> None:
    """Say that most of the model is on the last stage, since the step reads values on the way."""
    if pipeline.unseen_share > 0.5:
        rank_zero_warn(
            f"the step reads values of tensors behind `{pipeline.partition.names[-1]}` ({pipeline.stopped_by}), and "
            f"where that is cannot be seen beyond: {pipeline.unseen_share:.0%} of the parameters are on the last "
            "stage. Compute without values there (experts in grouped products instead of a loop over those that have "
            "tokens), or use `memopt_zero3`."
        )
