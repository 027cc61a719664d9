"""How many units the groups of a module had before structured pruning: its target is a share of these."""

from collections.abc import Mapping

from torch import nn

_ATTRIBUTE = "_units_at_first"
"""A mapping on the module, which its copies have too, and folders of it."""


def first_sizes(module: nn.Module) -> dict[str, int]:
    """The numbers by name of the group; empty where nothing was removed."""
    return vars(module).get(_ATTRIBUTE, {})


def remember_sizes(module: nn.Module, sizes: Mapping[str, int]) -> None:
    """Note ``sizes`` of groups, but of those that are known already, which were smaller by now."""
    vars(module)[_ATTRIBUTE] = {**sizes, **first_sizes(module)}
