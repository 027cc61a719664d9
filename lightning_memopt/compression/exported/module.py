"""A graph in the place of the module that it was exported from."""

import copy
from collections.abc import Mapping
from pickle import PicklingError
from typing import Any, Self

from torch import nn
from torch.fx import GraphModule
from typing_extensions import override

from lightning_memopt.compression.exported.calls import Inputs
from lightning_memopt.compression.ranges import Range


class ExportedModule(GraphModule):
    """What an exported graph computes, with the tensors that it reads and no others, under the names they had.

    It has no hooks and methods of the module that it was exported from; plain attributes of that, as ``config``, can
    still be read. Pickle refuses it.

    Args:
        graph: As exported, with observers or converted.
        source: The module that it was exported from.
        inputs: What it was exported with, as :mod:`~lightning_memopt.compression.exported.calls` writes it.
        ranges: Of inputs, by the name of their observer, what their rounding was made from.
    """

    def __init__(
        self, graph: GraphModule, source: nn.Module, inputs: Inputs, ranges: Mapping[str, Range] | None = None
    ) -> None:
        super().__init__(graph, copy.deepcopy(graph.graph), "ExportedModule")  # a graph knows one owner
        vars(self).update(_source=source, _inputs=inputs, _ranges=dict(ranges or {}))  # `source` is no part of it
        self.training = False

    @property
    def source(self) -> nn.Module:
        """The module that it was exported from; its tensors have no memory any more once the graph is converted."""
        return vars(self)["_source"]

    @property
    def inputs(self) -> Inputs:
        """What it was exported with."""
        return vars(self)["_inputs"]

    @property
    def ranges(self) -> dict[str, Range]:
        """Of inputs, by the name of their observer, what their rounding was made from."""
        return vars(self)["_ranges"]

    @override
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except (AssertionError, TypeError, ValueError) as error:  # of what torch checks
            said = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"A graph that was exported from a {type(self.source).__name__} takes no such arguments ({said}), "
                f"but those of its calls in calibration: {self.inputs}. Give it such, or exclude the module "
                "(exclude=...)."
            ) from error

    @override
    def train(self, mode: bool = True) -> Self:
        """Change nothing but the flag: it was exported in evaluation mode and stays so."""
        self.training = mode
        return self

    @override
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            source = vars(self).get("_source")
            if source is not None and not name.startswith("_") and name in vars(source):
                return vars(source)[name]
            kind = "module" if source is None else type(source).__name__
            raise AttributeError(
                f"{name!r} of a {kind} is read, of which nothing is left but an exported graph. Exclude that module "
                "(exclude=...), or quantize with engine='memopt', which leaves modules as they are."
            ) from error

    @override
    def __reduce__(self) -> Any:
        raise PicklingError(
            f"a {type(self.source).__name__} has become an exported graph, which pickle does not hold; "
            "save_compressed writes it"
        )

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> GraphModule:
        copied = super().__deepcopy__(memo)
        held = {name: copy.deepcopy(vars(self)[name], memo) for name in ("_source", "_inputs", "_ranges")}
        vars(copied).update(held)
        return copied
