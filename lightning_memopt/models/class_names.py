"""Names by which the class of a module is found again in another process."""

import sys
from operator import attrgetter

from torch import nn

NOTE, CLASS = "lightning_memopt", "class"
"""Where in a checkpoint callbacks of this package note the class of the module: ``checkpoint[NOTE][CLASS]``."""


def class_name(cls: type) -> str:
    """``"package.module:Class"``, of the class of modules that somebody wrote: FSDP2 and others derive one from it.

    Example:
        >>> class_name(nn.Linear), class_name(type("FSDPLinear", (nn.Linear,), {}))
        ('torch.nn.modules.linear:Linear', 'torch.nn.modules.linear:Linear')
    """
    modules = [base for base in cls.__mro__ if issubclass(base, nn.Module)]
    written = next((base for base in modules if "<locals>" in base.__qualname__ or _is_found(base)), cls)
    return f"{written.__module__}:{written.__qualname__}"


def _is_found(cls: type) -> bool:
    """Whether the class is what its name says."""
    try:
        return attrgetter(cls.__qualname__)(sys.modules[cls.__module__]) is cls
    except (KeyError, AttributeError):
        return False


def is_importable(name: str) -> bool:
    """Whether another process may find the class: not where a function or the script that was run defined it.

    Example:
        >>> is_importable("__main__:Net"), is_importable("my.models:Net")
        (False, True)
    """
    home, _, qualified = name.partition(":")
    return home not in ("", "__main__") and qualified != "" and "<" not in qualified
