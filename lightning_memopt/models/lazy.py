"""Tell modules whose parameters have no shape before their first forward (``nn.LazyLinear`` and the like)."""

from torch import nn
from torch.nn.parameter import is_lazy


def find_uninitialized(module: nn.Module) -> str | None:
    """Qualified name of the first parameter or buffer that has no shape yet, or ``None``."""
    for name, submodule in module.named_modules(remove_duplicate=False):
        for own, tensor in (*submodule._parameters.items(), *submodule._buffers.items()):
            if tensor is not None and is_lazy(tensor):
                return f"{name}.{own}" if name else own
    return None


def refuse_uninitialized(module: nn.Module, why: str = "its memory is not known") -> None:
    """Raise ``ValueError`` for a module of which :func:`find_uninitialized` finds something.

    Args:
        module: Any.
        why: What follows from it, for the message.

    Example:
        >>> refuse_uninitialized(nn.Sequential(nn.Linear(4, 4)))
    """
    if name := find_uninitialized(module):
        owner = type(module.get_submodule(name.rpartition(".")[0])).__name__
        raise ValueError(
            f"`{name}` has no shape before the first forward (it is of a {owner}), so {why}; run a batch through it "
            "first, such as at the end of `__init__`"
        )
