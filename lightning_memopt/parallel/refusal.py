"""Steps that do what a strategy cannot split: an error told apart from the user's own, and where it was."""

from torch import nn


class StepRefused(ValueError):
    """Raised in the midst of the user's step, alike on all ranks that share it."""


class StepWaits(StepRefused):
    """For what no stage may do anywhere in a step, behind its last block either."""


def failing_module(error: BaseException, module: nn.Module) -> str:
    """The qualified name of the innermost submodule of ``module`` whose code was running; empty if none was."""
    names = {submodule: name for name, submodule in module.named_modules()}
    found = ""
    traceback = error.__traceback__
    while traceback is not None:
        running = traceback.tb_frame.f_locals.get("self")
        if isinstance(running, nn.Module) and running in names:
            found = names[running]
        traceback = traceback.tb_next
    return found
