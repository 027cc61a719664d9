"""What the demo switches on, by the names of ``--techniques``."""

from collections.abc import Callable, Sequence

from lightning.pytorch.callbacks import Callback

import lightning_memopt as memopt
from lightning_memopt.demo.presets import Preset

_MAKE: dict[str, Callable[[Preset], Callback]] = {
    "checkpointing": lambda preset: memopt.ActivationCheckpointing("selective"),
    "micro-batching": lambda preset: memopt.MicroBatching(preset.micro_batch_size),
    "low-bit": lambda preset: memopt.LowBitOptimizer(8),
}


def callbacks(names: Sequence[str], preset: Preset) -> list[Callback]:
    """New callbacks for the techniques named; callbacks hold a run's state, so each run takes its own.

    Args:
        names: Names out of :data:`~lightning_memopt.demo.presets.TECHNIQUES`.
        preset: Size of the run.
    """
    return [_MAKE[name](preset) for name in names]
