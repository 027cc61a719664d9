"""What the demo switches on, by the names of ``--techniques``."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

from lightning.pytorch.callbacks import Callback

import lightning_memopt as memopt
from lightning_memopt.demo.presets import Preset

_MAKE: dict[str, Callable[[Preset], Callback]] = {
    "checkpointing": lambda preset: memopt.ActivationCheckpointing("selective"),
    "micro-batching": lambda preset: memopt.MicroBatching(preset.micro_batch_size),
    "low-bit": lambda preset: memopt.LowBitOptimizer(8),
}

_NEEDS = {"low-bit": "bitsandbytes"}


def available(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sort technique names into those that can run here and sentences on those that cannot.

    Args:
        names: Names out of :data:`~lightning_memopt.demo.presets.TECHNIQUES`.

    Returns:
        The names that can run, in the order given, and a sentence for each of the others.
    """
    missing = {name: _NEEDS[name] for name in names if name in _NEEDS and find_spec(_NEEDS[name]) is None}
    sentences = [
        f"{name} is left out: {library} is not installed (pip install 'lightning-memopt[quantize]')."
        for name, library in missing.items()
    ]
    return [name for name in names if name not in missing], sentences


def callbacks(names: Sequence[str], preset: Preset) -> list[Callback]:
    """New callbacks for the techniques named; callbacks hold a run's state, so each run takes its own."""
    return [_MAKE[name](preset) for name in names]
