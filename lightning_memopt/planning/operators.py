"""The operators of a step: what each computes and moves, which is what its time follows from."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_memopt.techniques.checkpointing.profile import is_product, product_flops

Part = Literal["forward", "backward", "recompute", "optimizer"]


class OperatorCall(NamedTuple):
    """Calls of one operator that cost the same.

    Attributes:
        part: What of the step they belong to.
        name: The operator, ``"aten.mm"``.
        dtype: Of its result, ``"float32"``.
        flops: Floating-point operations of one call if it is a matrix product, convolution or attention, else 0.
        moved_bytes: Bytes that one call reads and writes.
        count: How many calls; a fraction where a part of a step was traced for all of it.
    """

    part: Part
    name: str
    dtype: str
    flops: int
    moved_bytes: int
    count: float


class OperatorLog(TorchDispatchMode):
    """Lists the operators that run between :meth:`start` and :meth:`stop`, views left out.

    Example:
        >>> with OperatorLog() as log:
        ...     log.start()
        ...     product = torch.ones(2, 3) @ torch.ones(3, 4)
        >>> [(call.name, call.flops) for call in log.calls if call.flops]
        [('aten.mm', 48)]
    """

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[tuple[Part, str, str, int, int]] = Counter()
        self._is_on = False

    @property
    def calls(self) -> list[OperatorCall]:
        """What ran so far."""
        return [OperatorCall(*call, count) for call, count in self._counts.items()]

    def start(self) -> None:
        """List what runs from here on."""
        self._counts.clear()
        self._is_on = True

    def stop(self) -> None:
        """List nothing more."""
        self._is_on = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._is_on and isinstance(func, torch._ops.OpOverload) and not func.is_view:
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            if outputs:
                inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
                flops = product_flops(func, args, kwargs, result) if is_product(func) else 0
                dtype = str(outputs[0].dtype).removeprefix("torch.")
                self._counts[_part(), str(func.overloadpacket), dtype, flops, _moved_bytes(inputs, outputs)] += 1
        return result


def _part() -> Part:
    """What of the step runs now; optimizers run without gradients, recomputation in the backward with them."""
    in_backward = torch._C._current_graph_task_id() != -1
    if torch.is_grad_enabled():
        return "recompute" if in_backward else "forward"
    return "backward" if in_backward else "optimizer"


def _moved_bytes(inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in (*inputs, *outputs))
