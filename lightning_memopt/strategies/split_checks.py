"""What strategies that give ranks parts of a module ask of a trainer."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def refuse_averaging(strategy: str, trainer: pl.Trainer) -> None:
    """Refuse callbacks that average whole weights.

    Raises:
        MisconfigurationException: Names the callback, why, and what to do.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            raise MisconfigurationException(
                f"{strategy}: {type(callback).__name__} cannot work here: it copies the whole module before "
                "training, and the ranks then hold parts of it, which cannot be averaged with whole weights. Use "
                "`memopt_ddp`, or average the weights of checkpoints after training (`memopt.full_state_dict`)."
            )
