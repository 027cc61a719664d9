"""The operators of a step: what each computes and moves, which is what its time follows from."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_memopt.memory.arguments import tensor_arguments, tensor_results
from lightning_memopt.models.in_backward import is_in_backward
from lightning_memopt.planning.devices import CollectiveKind
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
        times: How many calls; a fraction where a part of a step was traced for all of it.
    """

    part: Part
    name: str
    dtype: str
    flops: int
    moved_bytes: int
    times: float


class Collective(NamedTuple):
    """Collectives of one size over one group.

    Attributes:
        kind: Which, as :meth:`~lightning_memopt.planning.devices.DeviceModel.collective_seconds` names it.
        size_bytes: Bytes of the whole tensor.
        ranks: The global ranks that take part.
        waits: Whether what follows needs the result at once, as in tensor parallelism.
        times: How often.
    """

    kind: CollectiveKind
    size_bytes: int
    ranks: tuple[int, ...]
    waits: bool
    times: float


_COLLECTIVES: dict[str, tuple[CollectiveKind, bool]] = {
    "c10d._allgather_base_": ("all_gather", False),
    "c10d._reduce_scatter_base_": ("reduce_scatter", False),
    "c10d.allreduce_": ("all_reduce", False),
    "c10d.send": ("send", False),
    "_c10d_functional.all_reduce": ("all_reduce", True),
    "_c10d_functional.all_gather_into_tensor": ("all_gather", True),
    "_c10d_functional.reduce_scatter_tensor": ("reduce_scatter", True),
    "_c10d_functional.all_to_all_single": ("all_to_all", True),
}
"""What the strategies call: FSDP2, DDP and pipelines beside other work, DTensor and tensor parallelism in its way."""


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
        self._collectives: Counter[tuple[CollectiveKind, int, tuple[int, ...], bool]] = Counter()
        self._is_on = False

    @property
    def calls(self) -> list[OperatorCall]:
        """What ran so far."""
        return [OperatorCall(*call, times) for call, times in self._counts.items()]

    @property
    def collectives(self) -> list[Collective]:
        """What ranks sent each other; in :attr:`calls` they are not."""
        return [Collective(*call, times) for call, times in self._collectives.items()]

    def start(self) -> None:
        """List what runs from here on."""
        self._counts.clear()
        self._collectives.clear()
        self._is_on = True

    def stop(self) -> None:
        """List nothing more."""
        self._is_on = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as of the tracker

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._is_on and isinstance(func, torch._ops.OpOverload) and not func.is_view:
            self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        outputs, inputs = tensor_results(result), tensor_arguments(args, kwargs)
        name = str(func.overloadpacket)
        if func.namespace in ("c10d", "_c10d_functional"):
            if name in _COLLECTIVES:
                kind, waits = _COLLECTIVES[name]
                size_bytes = max(tensor.nbytes for tensor in (*inputs, *outputs))
                self._collectives[kind, size_bytes, _ranks(args), waits] += 1
        elif inputs or outputs:
            if not outputs:  # of lists in place nothing is returned; the first is what is written
                outputs = tensor_arguments(args[:1], {})
            flops = product_flops(func, args, kwargs, result) if is_product(func) else 0
            dtype = str((outputs or inputs)[0].dtype).removeprefix("torch.")
            moved_bytes = sum(tensor.nbytes for tensor in (*inputs, *outputs))
            self._counts[_part(), name, dtype, flops, moved_bytes] += 1


def _ranks(args: Sequence[Any]) -> tuple[int, ...]:
    """The ranks of the process group among the arguments: an object, or its name, which is the last."""
    groups = [argument for argument in args if isinstance(argument, torch.ScriptObject)]
    group = dist.ProcessGroup.unbox(groups[0]) if groups else _resolve_process_group(args[-1])
    return tuple(dist.get_process_group_ranks(group))


def _part() -> Part:
    """What of the step runs now; optimizers run without gradients, recomputation in the backward with them."""
    in_backward = is_in_backward()
    if torch.is_grad_enabled():
        return "recompute" if in_backward else "forward"
    return "backward" if in_backward else "optimizer"
