"""Parameters that a step uses on some ranks only, as experts are to which one rank's tokens are routed.

FSDP2 reduces together the gradients that a rank has, so where ranks have those of different parameters it adds one
parameter's to another's, without a word if they are as large. An adapter: it reads private attributes of
``torch.distributed.fsdp._fully_shard``, tried with torch 2.13.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from lightning_memopt.models.instance_patch import Patches, replaced
from lightning_memopt.parallel.unshard import parameter_groups


class UnusedParameters:
    """Lets ranks reduce the gradients of the same parameters: a gradient that one rank lacks is zero there.

    Args:
        module: Sharded by FSDP2.
        mesh: The ranks that share it.
    """

    def __init__(self, module: nn.Module, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        self._groups = [
            group for part in module.modules() if isinstance(part, FSDPModule) for group in parameter_groups(part)
        ]
        self._used: dict[Any, bool] = {parameter: False for group in self._groups for parameter in group.fsdp_params}
        self._order: list[int] = []
        self._patches = Patches()
        for number, group in enumerate(self._groups):
            reduce = partial(self._reduce, number, group, group.post_backward)
            self._patches.enter_context(replaced(group, post_backward=reduce))

    def undo(self) -> None:
        """Leave FSDP2 as it is by itself."""
        self._patches.close()

    def agree(self) -> None:
        """After a backward, on all ranks: let what no rank used have no gradient, as on one device.

        Raises:
            ValueError: Ranks called blocks that others did not, and took each other's parameters for their own.
        """
        if not any(group.reduce_grads for group in self._groups):
            return
        order = zlib.crc32(repr(self._order).encode())
        self._order.clear()
        *used, last, first = self._max([*self._used.values(), order, -order])
        if last != -first:
            raise ValueError(
                "ranks called different blocks in one step (layers dropped at random, experts chosen for each rank's "
                "samples), and the parameters of a block are gathered by all ranks together; have all ranks call the "
                "same blocks, or use `memopt_ddp`."
            )
        for parameter, is_used in zip(self._used, used, strict=True):
            if not is_used:
                parameter.sharded_param.grad = None

    def _reduce(self, number: int, group: Any, reduce: Callable[..., Any], *args: Any) -> Any:
        if group.reduce_grads:
            gathered = [p for p in group.fsdp_params if hasattr(p, "_unsharded_param")]
            trained = [p for p in gathered if p.unsharded_param.requires_grad and p.unsharded_param.numel()]
            has = [p.unsharded_accumulated_grad is not None or p.unsharded_param.grad is not None for p in trained]
            for parameter, is_used in zip(trained, has, strict=True):
                before = self._used[parameter] and parameter.sharded_param.grad is not None
                self._used[parameter] = is_used or before
            if any(has):  # as on other ranks: what is reduced together is called together
                self._order.append(number)
                needed: Sequence[Any] = [True] * len(has)
                if any(p.sharded_param._post_accumulate_grad_hooks for p in trained):  # which step at once
                    needed = self._max(has)
                for parameter, is_used, is_needed in zip(trained, has, needed, strict=True):
                    if is_needed and not is_used:
                        parameter.unsharded_param.grad = torch.zeros_like(parameter.unsharded_param)
        return reduce(*args)

    def _max(self, values: Sequence[int]) -> list[int]:
        total = torch.tensor(values, dtype=torch.long, device=self._mesh.device_type)
        for dimension in range(self._mesh.ndim):
            dist.all_reduce(total, dist.ReduceOp.MAX, group=self._mesh.get_group(dimension))
        return total.tolist()
