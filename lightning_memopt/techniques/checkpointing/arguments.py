"""Take the arguments of a call apart into leaves, from which a replay gets arguments of its own.

What a block puts into a dict, a list or an object that it was given (``state.hidden = ...``) is for its caller. A
replay that was given the same object would read what it has become, and write to it once more.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

Build = Callable[[Sequence[Any]], Any]
"""Puts leaves together again, in containers and objects that are new each time."""


def take_apart(value: Any, within: frozenset[int] = frozenset()) -> tuple[list[Any], Build]:
    """The leaves of ``value`` and how to build its like from them.

    Containers that pytrees know are opened, and so are dataclasses and other objects with attributes whose class is
    written in Python, but for modules, functions and what belongs to torch. An object within itself is a leaf.

    Args:
        value: Anything; it is only read.
        within: The identities of the objects that ``value`` is a part of.

    Example:
        >>> leaves, build = take_apart({"a": [1, 2]})
        >>> leaves, build([3, 4])
        ([1, 2], {'a': [3, 4]})
    """
    parts, spec = tree_flatten(value)
    leaves: list[Any] = []
    builds: list[tuple[int, Build]] = []
    for part in parts:
        inner, build = [part], _only
        if id(part) not in within:
            if isinstance(part, dict | list | set):  # of a class of their own, which pytrees do not know
                inner, build = [copy(part)], _copied
            elif (attributes := _attributes(part)) is not None:
                inner, build_attributes = take_apart(attributes, within | {id(part)})
                build = partial(_object, type(part), build_attributes)
        leaves += inner
        builds.append((len(inner), build))

    def build_all(leaves: Sequence[Any]) -> Any:
        built, start = [], 0
        for length, build in builds:
            built.append(build(leaves[start : start + length]))
            start += length
        return tree_unflatten(built, spec)

    return leaves, build_all


def refuse_iterators(name: str, leaves: Sequence[Any]) -> None:
    """Raise a :class:`RuntimeError` where the region ``name`` is given what can be gone through once."""
    for leaf in leaves:
        if isinstance(leaf, Iterator):
            raise RuntimeError(
                f"{name} is given a {type(leaf).__name__}, which is used up by the forward: the recomputation "
                "would find nothing more in it. Give it a list or a tuple, or leave it out with `modules=`."
            )


def _attributes(part: Any) -> dict[str, Any] | None:
    """What an object holds, where another can be made that holds the same."""
    kind = type(part)
    if isinstance(part, torch.Tensor | nn.Module | type | FunctionType | Iterator) or callable(part):
        return None
    is_written_in_python = kind.__new__ is object.__new__ and isinstance(kind.__init__, FunctionType)
    is_open = kind is SimpleNamespace or hasattr(kind, "__dataclass_fields__") or is_written_in_python
    if not is_open or kind.__module__.partition(".")[0] == "torch":
        return None
    state = object.__getstate__(part)
    by_name, in_slots = state if isinstance(state, tuple) else (state, None)
    return {**(by_name or {}), **(in_slots or {})}


def _only(leaves: Sequence[Any]) -> Any:
    return leaves[0]


def _copied(leaves: Sequence[Any]) -> Any:
    return copy(leaves[0])


def _object(kind: type, build: Build, leaves: Sequence[Any]) -> Any:
    made = SimpleNamespace() if kind is SimpleNamespace else object.__new__(kind)
    for name, value in build(leaves).items():
        object.__setattr__(made, name, value)
    return made
