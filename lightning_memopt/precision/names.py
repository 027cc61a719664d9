"""The names that the precision plugins accept."""

from collections.abc import Iterable

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""16-bit formats by name: bfloat16 has float32's range and 8 bits of precision, float16 a small range and 11 bits."""


def check_name(plugin: str, argument: str, value: object, possible: Iterable[str]) -> None:
    """Refuse a name that is not one of ``possible``.

    Raises:
        MisconfigurationException: Says what was given and what is possible.
    """
    if value not in (names := list(possible)):
        raise MisconfigurationException(
            f"{plugin}({argument}={value!r}) is not a known {argument}; possible are {', '.join(map(repr, names))}."
        )
