"""The modules that a pipeline may be cut before, in the order in which a step calls them."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import nn


class Observer(Protocol):
    """Stands in for each call of a module of the chain."""

    def called(self, index: int, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what module ``index`` returns; ``call`` is its own call."""


class Chain:
    """Puts an observer before the calls of modules, before all their hooks and whatever replaced their ``forward``.

    It gives the modules a subclass of their class, as FSDP2 does, until :meth:`remove`.

    Args:
        modules: Each is one link.

    Attributes:
        observer: Who is told; ``None`` while calls go through.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        self.observer: Observer | None = None
        self._is_inside = False
        self._index = {module: index for index, module in enumerate(self.modules)}
        self._classes = [type(module) for module in self.modules]
        linked = {cls: self._linked(cls) for cls in set(self._classes)}
        for module, cls in zip(self.modules, self._classes, strict=True):
            module.__class__ = linked[cls]

    def remove(self) -> None:
        """Give the modules their classes back."""
        for module, cls in zip(self.modules, self._classes, strict=True):
            module.__class__ = cls

    def _linked(self, cls: type[nn.Module]) -> type[nn.Module]:
        chain = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            def own(*args: Any, **kwargs: Any) -> Any:
                return cls.__call__(module, *args, **kwargs)

            def entered(*args: Any, **kwargs: Any) -> Any:
                chain._is_inside = True
                try:
                    return own(*args, **kwargs)
                finally:
                    chain._is_inside = False

            # What a link calls by itself is its own: a copy of it that is profiled, or it again.
            if chain.observer is None or chain._is_inside or module not in chain._index:
                return own(*args, **kwargs)
            return chain.observer.called(chain._index[module], entered, args, kwargs)

        names = {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        return type(cls.__name__, (cls,), names)
