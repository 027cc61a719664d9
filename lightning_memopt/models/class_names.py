"""Names by which the class of a module is found again in another process."""

NOTE, CLASS = "lightning_memopt", "class"
"""Where in a checkpoint callbacks of this package note the class of the module: ``checkpoint[NOTE][CLASS]``."""


def class_name(cls: type) -> str:
    """``"package.module:Class"``.

    Example:
        >>> from torch import nn
        >>> class_name(nn.Linear)
        'torch.nn.modules.linear:Linear'
    """
    return f"{cls.__module__}:{cls.__qualname__}"


def is_importable(name: str) -> bool:
    """Whether another process may find the class: not where a function or the script that was run defined it.

    Example:
        >>> is_importable("__main__:Net"), is_importable("my.models:Net")
        (False, True)
    """
    home, _, qualified = name.partition(":")
    return home not in ("", "__main__") and qualified != "" and "<" not in qualified
