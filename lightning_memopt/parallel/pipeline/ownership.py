"""What a rank holds of a module: freeing the rest, and keeping alike what several stages hold."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase

from lightning_memopt.parallel.agreement import broadcast_in_place
from lightning_memopt.parallel.pipeline.stubs import find_places


@torch.no_grad()
def free_in_place(module: nn.Module, tensors: set[Tensor]) -> dict[Tensor, Tensor]:
    """Put parameters and buffers of ``module`` on the meta device, tied ones still tied.

    Returns:
        Of each, what is now in its place.
    """
    freed: dict[Tensor, Tensor] = {}
    for owner, name, tensor in find_places(module, tensors):
        if tensor not in freed:
            meta = torch.empty_like(tensor, device="meta")
            if isinstance(tensor, nn.Parameter):
                meta = nn.Parameter(meta, requires_grad=tensor.requires_grad)
                vars(meta).update(vars(tensor) | vars(meta))
            freed[tensor] = meta
        setattr(owner, name, freed[tensor])  # not `_parameters`: recurrent modules keep a list of their own
    return freed


class SharedParameters:
    """Parameters that several ranks of the pipeline hold (tied weights): one gradient, the sum of theirs.

    All ranks of the world make it together.

    Args:
        names: Of each such parameter, the ranks of the pipeline that hold it, in the model's order.
        module: The model.
        group: The ranks of the pipeline.
        pipelines: The global ranks of each pipeline of the world, which all hold alike.
    """

    def __init__(
        self,
        names: Mapping[str, tuple[int, ...]],
        module: nn.Module,
        group: dist.ProcessGroup,
        pipelines: Sequence[Sequence[int]],
    ) -> None:
        self._rank = dist.get_rank(group)
        self._module = module
        self._names = dict(names)
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        for ranks in dict.fromkeys(self._names.values()):
            if len(ranks) == dist.get_world_size(group):
                self._groups[ranks] = group
                continue
            # By every rank of the world, its own or not: NCCL splits the world's communicator, and waits for all.
            for pipeline in pipelines:
                sharing = [pipeline[rank] for rank in ranks]
                made = dist.new_group(sharing)
                if dist.get_rank() in sharing:
                    self._groups[ranks] = made

    def counts(self, parameter: nn.Parameter) -> bool:
        """Whether this rank is the first of those that hold it."""
        for name, ranks in self._names.items():
            if self._module.get_parameter(name) is parameter:
                return self._rank == ranks[0]
        return True

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Add up their gradients, in place; one without gradient on every rank stays without."""
        for ranks, group in self._groups.items():
            parameters = [self._module.get_parameter(name) for name, of in self._names.items() if of == ranks]
            parameters = [parameter for parameter in parameters if parameter.requires_grad]
            if not parameters:
                continue
            device = parameters[0].device
            used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int).to(device)
            dist.all_reduce(used, dist.ReduceOp.MAX, group)
            for parameter, is_used in zip(parameters, used.tolist(), strict=True):
                if not is_used:
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradient = parameter.grad
                if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
                    # An embedding's may be whole, or pending as a sum, where the head's is a shard.
                    parameter.grad = gradient = gradient.redistribute(placements=parameter.placements)
                local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                dist.all_reduce(local, group=group)


class SharedBuffers:
    """Buffers that every stage holds, and that those which run their modules write.

    Args:
        names: Of these buffers.
        module: The model.
        group: The ranks of the pipeline.
    """

    def __init__(self, names: Sequence[str], module: nn.Module, group: dist.ProcessGroup) -> None:
        self._module = module
        self._group = group
        self._names = list(names)
        self._states = self._read_states()

    def share(self) -> None:
        """Give all stages what the last of those that wrote a buffer since the last call has; all ranks together."""
        buffers = [self._module.get_buffer(name) for name in self._names]
        written = [
            (buffer.shape, buffer.dtype) if before != now else None
            for buffer, before, now in zip(buffers, self._states, self._read_states(), strict=True)
        ]
        everyone: list[Any] = [[]] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, written, group=self._group)
        for buffer, by_rank in zip(buffers, zip(*everyone, strict=True), strict=True):
            if any(by_rank):
                source, (shape, dtype) = max((rank, now) for rank, now in enumerate(by_rank) if now)
                if (buffer.shape, buffer.dtype) != (shape, dtype):  # the step has made another of it
                    buffer.data = buffer.new_empty(shape, dtype=dtype)
                broadcast_in_place(buffer, dist.get_global_rank(self._group, source), self._group)
        self._states = self._read_states()

    def _read_states(self) -> list[Hashable]:
        """What is another after a buffer was written."""
        return [self._read_state(*name.rpartition(".")) for name in self._names]

    def _read_state(self, path: str, _: str, name: str) -> Hashable:
        owner = self._module.get_submodule(path)
        buffer = owner.get_buffer(name)
        if isinstance(owner, _NormBase):  # whose kernels write running statistics without counting that
            return tuple(buffer.flatten().tolist())
        return id(buffer), buffer._version
