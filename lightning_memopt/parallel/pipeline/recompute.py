"""Blocks that the user's step calls within ``torch.utils.checkpoint``, which calls them again in the backward."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils import checkpoint
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_memopt.parallel.pipeline.carried import Output, put

_OF_REENTRANT = checkpoint.CheckpointFunction.forward.__code__


def is_checkpointed() -> bool:
    """Whether the caller runs within ``torch.utils.checkpoint``; it has no public way to tell."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != checkpoint.__file__:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def is_checkpointed_reentrantly() -> bool:
    """Whether the caller runs within ``torch.utils.checkpoint`` with ``use_reentrant=True``.

    That has gradients for what it was called with alone: where a received tensor takes the place of a stub within,
    its gradient is lost.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _OF_REENTRANT:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


class Recomputation:
    """Observes the backward of a micro-batch on a stage, in which links are called again as they were in its forward.

    What calls them begins with what it was called with, stubs where a stage received something.

    Args:
        start: The first link of the stage.
        outputs: What links before it returned, where that is stubs only.
        replaced: Of each link, what took the place of stubs, by their position among the leaves of the arguments.
        carried: What took the place of what modules returned.
        begin: The link that the stage began with, and what is called before it, as in the forward: random numbers
            are to be the same again.
    """

    def __init__(
        self,
        start: int,
        outputs: Mapping[int, Any],
        replaced: Mapping[int, Mapping[int, Tensor]],
        carried: Mapping[Output, Tensor],
        begin: tuple[int | None, Callable[[], None]],
    ) -> None:
        self._start = start
        self._outputs = outputs
        self._replaced = replaced
        self._carried = carried
        self._first, self._begin = begin

    def returned(self, name: str, output: Any) -> Any:
        """What the module returned in the forward."""
        return put(self._carried, name, output)

    def called(self, index: int, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pass over links of earlier stages, and run own ones on the values of the forward."""
        if index < self._start and index in self._outputs:
            return self._outputs[index]
        if index == self._first and index in self._replaced:
            self._begin()
        if index in self._replaced:
            leaves, tree = tree_flatten((args, kwargs))
            for position, value in self._replaced[index].items():
                leaves[position] = value
            args, kwargs = tree_unflatten(leaves, tree)
        return call(*args, **kwargs)
