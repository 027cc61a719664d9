"""Have functions that a copied module holds know the copy, and not the original."""

from collections.abc import Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn


def rebind_functions(module: nn.Module, copies: Mapping[int, Any]) -> None:
    """Give hooks and functions that ``module`` holds the copies of what they know by a closure.

    Functions are copied as they are. A hook such as ``lambda *_: self.seen.append(1)`` acts on the module that it was
    made for: of a copy too, whose forward would go on with what the original saw.

    Args:
        module: The copy, with everything below it.
        copies: By the ids of originals what they were copied to: the ``memo`` of ``copy.deepcopy``.
    """
    for part in module.modules():
        held = vars(part)
        for container in [held, *(value for value in held.values() if isinstance(value, dict | list))]:
            items = container.items() if isinstance(container, dict) else enumerate(container)
            for key, value in list(items):
                if (rebound := _rebound(value, copies)) is not value:
                    container[key] = rebound


def _rebound(value: Any, copies: Mapping[int, Any], within: tuple[Any, ...] = ()) -> Any:
    """``value``, or where it is a function that knows an original, one that knows its copy."""
    if not isinstance(value, FunctionType) or not value.__closure__ or value in within:
        return value
    cells = tuple(_copied_cell(cell, copies, (*within, value)) for cell in value.__closure__)
    if all(new is old for new, old in zip(cells, value.__closure__, strict=True)):
        return value
    rebound = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
    rebound.__kwdefaults__, rebound.__qualname__ = value.__kwdefaults__, value.__qualname__
    vars(rebound).update(vars(value))
    return rebound


def _copied_cell(cell: CellType, copies: Mapping[int, Any], within: tuple[Any, ...]) -> CellType:
    """The cell itself where nothing in it was copied, so that what functions share by it stays shared."""
    try:
        known = cell.cell_contents
    except ValueError:  # empty so far
        return cell
    if isinstance(known, MethodType) and id(known.__self__) in copies:
        return CellType(MethodType(known.__func__, copies[id(known.__self__)]))
    new = copies[id(known)] if id(known) in copies else _rebound(known, copies, within)
    return cell if new is known else CellType(new)
