"""Where a run on fake tensors asks for a value: say which operator, and by which line."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

_PACKAGE = Path(__file__).parents[1]


class ReadsValues(ValueError):
    """What is run depends on the values of tensors, and fake tensors have none."""


@contextmanager
def explain_reads_of_values(cannot: str, instead: str) -> Iterator[None]:
    """Within the block, an operator that fake tensors do not have is named, with the user's line that runs it.

    Args:
        cannot: What cannot be for it: ``"MyModule cannot be predicted"``.
        instead: What to do.

    Raises:
        ReadsValues: There is one.
    """
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise _explained(cannot, instead, error, str(error.func)) from error
    except RuntimeError as error:
        if not str(error).startswith(".numpy() is not supported"):
            raise
        raise _explained(cannot, instead, error, "Tensor.numpy()") from error


def line_of_step(error: BaseException) -> str:
    """The user's line, or a library's, in which a step failed, as ``"file:line"``."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_of_step(Path(frame.filename))]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else "its step"


def _explained(cannot: str, instead: str, error: Exception, operator: str) -> ReadsValues:
    if operator.startswith("aten._local_scalar_dense"):
        operator += " (.item(), float(), bool(), if)"
    return ReadsValues(
        f"{cannot}: {line_of_step(error)} runs {operator}, whose result depends on the values of tensors, and fake "
        f"tensors have none; {instead}"
    )


def _is_of_step(path: Path) -> bool:
    """Whether a file is the user's, a library's, or an optimizer of PyTorch's, and no machinery."""
    is_optimizer = path.parent.match("torch/optim") and path.name != "optimizer.py"
    return is_optimizer or not (path.is_relative_to(_PACKAGE) or "torch" in path.parts)
