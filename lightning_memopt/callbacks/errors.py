"""Errors of the plain layers, as Lightning's users expect them: with the callback's name in front."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException


@contextmanager
def named_errors(callback: Callback) -> Iterator[None]:
    """Raise what is wrong in the block as a ``MisconfigurationException`` that begins with the callback's name."""
    try:
        yield
    except (ValueError, MisconfigurationException) as error:
        raise MisconfigurationException(f"{type(callback).__name__}: {error}") from error
