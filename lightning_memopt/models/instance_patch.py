"""Replace methods and properties of one object, and put them back."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


class Patches(ExitStack):
    """What its owner has to undo. Its copies have nothing to undo: patches stay on what they were made on."""

    def __reduce__(self) -> tuple[type["Patches"], tuple[()]]:
        return type(self), ()


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
    Its copies, and what is pickled, are of the first.
    """
    cls: Any = type(target)

    def reduce(self: Any, protocol: Any) -> Any:
        reduced: Any = cls.__reduce_ex__(self, protocol)
        _, (_, *arguments), *state = reduced
        return cls.__new__, (cls, *arguments), *state

    members = {name: property(lambda _: read()), "__reduce_ex__": reduce, "__module__": cls.__module__}
    target.__class__ = type(cls.__name__, (cls,), members)
    try:
        yield
    finally:
        target.__class__ = cls
