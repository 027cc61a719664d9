"""What the modules of a region hold in plain attributes: counters, flags, caches, lists."""

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from torch import nn

_CONTAINERS = (list, dict, set, deque, defaultdict, Counter, OrderedDict)
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


class Attributes:
    """The plain attributes of ``module`` and its submodules at one moment.

    Values are kept by reference, lists, dicts and sets as shallow copies, for a forward may change those in place.
    Parameters, buffers, submodules and hooks are left out.
    """

    def __init__(self, module: nn.Module) -> None:
        self._held = [(owner, {n: _copied(v) for n, v in _plain(owner).items()}) for owner in module.modules()]

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Within the block they are as they were; afterwards as they are now, whatever is done to them within."""
        now = [(owner, _plain(owner)) for owner, _ in self._held]
        try:
            for owner, held in self._held:
                _assign(owner, {name: _copied(value) for name, value in held.items()})
            yield
        finally:
            for owner, held in now:
                _assign(owner, held)


def _plain(owner: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if name not in _OF_EVERY_MODULE}


def _assign(owner: nn.Module, held: dict[str, Any]) -> None:
    attributes = vars(owner)  # not `setattr`, with which a module would register parameters and may do more
    for name in [name for name in attributes if name not in held and name not in _OF_EVERY_MODULE]:
        del attributes[name]
    attributes.update(held)


def _copied(value: Any) -> Any:
    return copy(value) if type(value) in _CONTAINERS else value
