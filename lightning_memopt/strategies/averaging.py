"""Lightning's averages of weights where ranks hold parts of a module: each averages, swaps and saves its own.

The adapter for what Lightning's callbacks keep to themselves (2.6): the averaged copy, which they make of the whole
module before a strategy takes that apart, and how they exchange weights between the two.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn

from lightning_memopt.models.instance_patch import Patches, replaced
from lightning_memopt.parallel.averages import cut_what_is_loaded, hold_parts_like, local_parameters
from lightning_memopt.parallel.gather import complete_in_place, gather_module_state
from lightning_memopt.parallel.moving import move_in_place
from lightning_memopt.parallel.unshard import make_whole

StateOf = Callable[[nn.Module], dict[str, Any]]


class AverageOfParts:
    """An average of which this rank holds what it holds of the module. All ranks make it together.

    Args:
        average: A whole copy of ``module``, from before that was taken apart.
        module: Of which ranks hold parts.
        reshard: Frees what is gathered of ``module``, which evaluation leaves behind.

    Raises:
        ValueError: ``average`` has no values.
    """

    def __init__(self, average: nn.Module, module: nn.Module, reshard: Callable[[], None]) -> None:
        self._average = average
        self._module = module
        self._reshard = reshard
        self._patches = Patches()
        hold_parts_like(average, module)
        for loads in (average, module):
            self._patches.callback(cut_what_is_loaded(loads))

    def patch(self, target: Any, **methods: Callable[..., Any]) -> None:
        """Give ``target`` these methods until :meth:`undo`."""
        self._patches.enter_context(replaced(target, **methods))

    def of_parts(self, act: Callable[..., Any]) -> Callable[..., Any]:
        """``act``, which computes with the parameters of both, made to find plain tensors of what this rank holds."""

        def acts(*args: Any, **kwargs: Any) -> Any:
            # Evaluation, around which weights are swapped, is in inference mode, whose tensors could not be trained.
            with torch.inference_mode(False), torch.no_grad():
                self._reshard()
                with local_parameters(self._average, self._module):
                    return act(*args, **kwargs)

        return acts

    def undo(self, gather: bool) -> None:
        """Put the callback back, and a whole average if ``gather``, which all ranks do together."""
        self._patches.close()
        if gather:
            make_whole(self._average)
            complete_in_place(self._average)


def share_averages(
    trainer: pl.Trainer, module: pl.LightningModule, reshard: Callable[[], None], state_of: StateOf
) -> list[AverageOfParts]:
    """Let the callbacks of ``trainer`` that average ``module`` average what each rank holds; all ranks together.

    Args:
        trainer: Its callbacks are patched.
        module: Of which ranks hold parts.
        reshard: Frees what is gathered of it.
        state_of: What of a module of which this rank holds parts goes into a checkpoint.

    Raises:
        ValueError: An average has no values.
    """
    shared = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, WeightAveraging | StochasticWeightAveraging) or callback._average_model is None:
            continue
        if isinstance(callback, WeightAveraging):
            shared.append(_share_weight_averaging(callback, module, reshard, state_of))
        else:
            shared.append(_share_stochastic(callback, module, reshard))
    return shared


def _share_weight_averaging(
    callback: WeightAveraging, module: pl.LightningModule, reshard: Callable[[], None], state_of: StateOf
) -> AverageOfParts:
    averaged: Any = callback._average_model  # around the copy
    average = AverageOfParts(averaged.module, module, reshard)

    def state() -> dict[str, Any]:
        own = {f"module.{name}": value for name, value in state_of(averaged.module).items()}
        return {"n_averaged": averaged.n_averaged, **own}

    average.patch(averaged, update_parameters=average.of_parts(averaged.update_parameters), state_dict=state)
    average.patch(
        callback,
        _swap_models=average.of_parts(callback._swap_models),
        _copy_average_to_current=average.of_parts(callback._copy_average_to_current),
    )
    return average


def _share_stochastic(
    callback: StochasticWeightAveraging, module: pl.LightningModule, reshard: Callable[[], None]
) -> AverageOfParts:
    copy: Any = callback._average_model
    average = AverageOfParts(copy, module, reshard)
    state_dict = callback.state_dict

    def state() -> dict[str, Any]:
        # Whole in every kind of checkpoint: what callbacks save is rank 0's.
        return {**state_dict(), "average_model_state": gather_module_state(copy, keep=module.global_rank == 0)}

    if any(parameter.is_meta for parameter in copy.parameters()):

        def to(device: torch.device | str) -> Any:
            move_in_place(copy, torch.device(device))
            return copy

        average.patch(copy, to=to)  # torch's own fails at what other stages hold
    average.patch(
        callback,
        update_parameters=average.of_parts(callback.update_parameters),
        transfer_weights=average.of_parts(callback.transfer_weights),
        state_dict=state,
    )
    return average
