"""Which submodules a user means: patterns of qualified names, and classes of modules."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

Selector = str | type[nn.Module]


def as_selectors(value: Selector | Sequence[Selector], argument: str = "modules") -> list[Selector]:
    """``value`` as a list.

    Args:
        value: A pattern (:func:`fnmatch.fnmatchcase`), a class of modules, or several of these.
        argument: What the user calls it, for the error.

    Raises:
        ValueError: It is empty, or holds what is neither a pattern nor a class of modules.

    Example:
        >>> as_selectors("model.layers.*")
        ['model.layers.*']
    """
    selectors = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not selectors or not all(map(_is_selector, selectors)):
        raise ValueError(
            f"{argument}={value!r} does not say which modules are meant; give a class of modules, a pattern of names "
            "such as 'model.layers.*', a list of these, or None for the default"
        )
    return selectors


def matches(name: str, module: nn.Module, selector: Selector) -> bool:
    """Whether ``selector`` means the submodule ``module``, whose qualified name is ``name``."""
    if not isinstance(selector, str):
        return isinstance(module, selector)
    return name == selector or fnmatchcase(name, selector)  # a name with brackets is no pattern that matches it


def show(selector: Selector) -> str:
    """``selector`` as an error names it."""
    return selector if isinstance(selector, str) else selector.__name__


def _is_selector(value: object) -> bool:
    return issubclass(value, nn.Module) if isinstance(value, type) else isinstance(value, str) and value != ""
