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
