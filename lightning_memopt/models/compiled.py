"""What ``torch.compile`` made of a module: it does not look at hooks that come, go or change after it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module``, or one below it, is compiled: wrapped, in place, or as a whole LightningModule."""
    return any(
        part._compiled_call_impl is not None
        or getattr(part, "_compiler_ctx", None) is not None
        or type(part).__name__ == "OptimizedModule"
        for part in module.modules()
    )


@contextmanager
def run_uncompiled(module: nn.Module) -> Iterator[None]:
    """Run what is compiled of ``module`` as it is written, with its hooks, while the block runs."""
    if not is_compiled(module):  # torch.compiler takes seconds to load
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def uncompiled(call: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    """``call``, in which the module that it is given runs uncompiled."""

    def run(module: nn.Module) -> Any:
        with run_uncompiled(module):
            return call(module)

    return run


def compile_anew(module: nn.Module) -> None:
    """Have what is compiled of ``module`` be compiled again at its next call, with the hooks as they are by then."""
    if is_compiled(module):
        torch.compiler.reset()


def forget_compiled(module: nn.Module) -> None:
    """Have ``module``, which is a copy, run its own code and not that which was compiled of the original.

    Functions are copied as they are, and what Lightning's modules have compiled in their place is a function that
    knows the module that it was made of. Copies of other modules leave it out, and wrapped ones are wrapped anew.
    """
    for part in module.modules():
        vars(part).pop("_compiled_call_impl", None)
        context = vars(part).get("_compiler_ctx")  # of Lightning's, where all of a LightningModule is compiled
        if context is None:
            continue
        vars(part)["_compiler_ctx"] = None
        for key, method in context.items():
            if key.startswith("original_"):
                name = key.removeprefix("original_")
                vars(part).pop(name, None)
                if getattr(method, "__func__", None) is not getattr(type(part), name, None):
                    vars(part)[name] = method
