"""The modules that a pipeline may be cut before, in the order in which a step calls them."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

from torch import nn

from lightning_memopt.parallel.refusal import StepRefused


class _Link:
    """What the modules of a chain are instances of besides."""


def holds_links(module: nn.Module) -> bool:
    """Whether a pipeline may be cut within ``module``, of which a call has not all values on a stage then."""
    return any(isinstance(part, _Link) for part in module.modules() if part is not module)


class Observer(Protocol):
    """Stands in for each call of a module of the chain."""

    def called(self, index: int, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what module ``index`` returns; ``call`` is its own call."""

    def returned(self, name: str, output: Any) -> Any:
        """Return what takes the place of what the watched module ``name`` returned; ``None`` leaves it."""


class Chain:
    """Puts an observer before the calls of modules, before all their hooks and whatever replaced their ``forward``.

    It gives the modules a subclass of their class, as FSDP2 does, until :meth:`remove`.

    Args:
        modules: Each is one link, or several where it is called so often: each of its calls is one.
        watched: By name, modules of which the observer is told what they return, before their other hooks are.

    Attributes:
        absent: Names of those of which this rank holds nothing: without an observer they cannot be called.
    """

    def __init__(self, modules: Iterable[nn.Module], watched: Mapping[str, nn.Module] = MappingProxyType({})) -> None:
        self.absent: dict[nn.Module, str] = {}
        self._observer: Observer | None = None
        self._is_inside = False
        self._indices: dict[nn.Module, list[int]] = {}
        for index, module in enumerate(modules):
            self._indices.setdefault(module, []).append(index)
        self._calls: Counter[nn.Module] = Counter()
        self._classes = [type(module) for module in self._indices]
        linked = {cls: self._linked(cls) for cls in set(self._classes)}
        for module, cls in zip(self._indices, self._classes, strict=True):
            module.__class__ = linked[cls]
        self._hooks = [
            module.register_forward_hook(self._watch(name), prepend=True) for name, module in watched.items()
        ]

    @property
    def observer(self) -> Observer | None:
        """Who is told of a run; ``None`` while calls go through."""
        return self._observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self._observer = observer
        self._calls.clear()

    def remove(self) -> None:
        """Give the modules their classes back."""
        for hook in self._hooks:
            hook.remove()
        for module, cls in zip(self._indices, self._classes, strict=True):
            module.__class__ = cls

    def _index_of_call(self, module: nn.Module) -> int:
        """Of this call; that of the last where there are more than links."""
        indices = self._indices[module]
        self._calls[module] += 1
        return indices[min(self._calls[module], len(indices)) - 1]

    def _watch(self, name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def tell(module: nn.Module, args: Any, output: Any) -> Any:
            return None if self.observer is None else self.observer.returned(name, output)

        return tell

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

            if chain.observer is None and module in chain.absent:
                raise StepRefused(
                    f"`{chain.absent[module]}` was called outside of a step, and this rank holds nothing of it: only "
                    "in steps do batches pass through all stages of a pipeline. Call the model in `validation_step` "
                    "or `predict_step`, or use `memopt_zero3`."
                )
            # What a link calls by itself is its own: a copy of it that is profiled, or it again.
            if chain.observer is None or chain._is_inside or module not in chain._indices:
                return own(*args, **kwargs)
            return chain.observer.called(chain._index_of_call(module), entered, args, kwargs)

        names = {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        return type(cls.__name__, (cls, _Link), names)
