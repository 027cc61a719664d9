"""Replace methods and properties of one object, and put them back."""

from collections.abc import Callable, Iterator
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


@contextmanager
def with_property(target: Any, name: str, read: Callable[[], Any]) -> Iterator[None]:
    """Within the block ``target``, this one object, has ``read()`` for what its class has a property for.

    A property is looked up in the class alone, so the object gets a class of its own, under the name of the first.
    """
    cls = type(target)
    target.__class__ = type(cls.__name__, (cls,), {name: property(lambda _: read()), "__module__": cls.__module__})
    try:
        yield
    finally:
        target.__class__ = cls
