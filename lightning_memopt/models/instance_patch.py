"""Replace methods of one object, and put them back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(target: Any, **attributes: Any) -> Iterator[None]:
    """Within the block ``target``, this one object, has ``attributes`` in place of its class's.

    Args:
        target: An object with a ``__dict__``.
        **attributes: What to set, by name.
    """
    before = {name: vars(target)[name] for name in attributes if name in vars(target)}
    vars(target).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            vars(target).pop(name, None)
        vars(target).update(before)
