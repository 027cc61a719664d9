"""ZeRO stages 1, 2 and 3 by FSDP2, applied to a module in place and undone.

Source of the stages: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"
(https://arxiv.org/abs/1910.02054). With N ranks, FSDP2 keeps parameters, gradients and optimizer state sharded
between steps in every stage; the stages differ in what is whole *during* a step:

=============  ==========================================  =============================================
stage          parameters                                  gradients while accumulating
=============  ==========================================  =============================================
"optimizer"    whole from forward to the end of backward   whole, reduced once per optimizer step
"gradients"    whole from forward to the end of backward   sharded, reduced after every micro-batch
"parameters"   whole one block at a time                   whole, reduced once per optimizer step
=============  ==========================================  =============================================
"""

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from lightning_memopt.parallel.replicated import average_gradients, find_scalars
from lightning_memopt.parallel.units import (
    check_can_shard,
    find_independent_children,
    find_odd_modules,
    find_shard_units,
)
from lightning_memopt.parallel.unshard import unshard_in_place
from lightning_memopt.parallel.unused import UnusedParameters

ShardStage = Literal["optimizer", "gradients", "parameters"]


@dataclass(frozen=True)
class Sharding:
    """A sharded module: switches gradient reduction, and puts the module back.

    Attributes:
        module: The module, sharded in place.
        stage: Which ZeRO stage.
        roots: The modules whose call gathers what belongs to no block.
        unused: What ranks use of it.
    """

    module: nn.Module
    stage: ShardStage
    roots: tuple[FSDPModule, ...]
    unused: UnusedParameters
    _undo: list[Callable[[], Any]] = field(default_factory=list)

    @contextmanager
    def accumulate(self) -> Generator[None, None, None]:
        """Leave out what a backward pass need not do when another follows before the optimizer step.

        Stage "gradients" reduces all the same: it never keeps whole gradients. The other two keep them, and save
        the communication.
        """
        if self.stage == "gradients":
            yield
            return
        # Parameters do not change between micro-batches, so where they are whole through a step they may stay so.
        stays_whole = self.stage == "optimizer"
        for root in self.roots:
            root.set_requires_gradient_sync(False)
            root.set_reshard_after_backward(not stays_whole)
        try:
            yield
        finally:
            for root in self.roots:
                root.set_requires_gradient_sync(True)
                root.set_reshard_after_backward(True)

    def begin_backward_at(self, tensors: Sequence[Tensor]) -> None:
        """Do at the gradients of these what is done at those of what a root's call returns.

        For a call that was unwound with them, and returned nothing. Without it nothing would reduce the gradients of
        a root of which no unit took part in the call. The hook is private in torch; tried with 2.13.
        """
        for root in self.roots:
            root._get_fsdp_state()._register_pre_backward_hook(tuple(tensors))

    def reshard(self) -> None:
        """Free whatever is gathered, as after a forward pass without a backward pass."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        # Within a forward FSDP2 keeps what it keeps until the backward, and one that was unwound never ended. The
        # hooks with which it saves shards do not ask.
        nn.Module.state_dict(self.module, keep_vars=True)

    def undo(self, gather: bool = True) -> None:
        """Put classes and hooks back, and whole plain parameters on the CPU in place of the shards.

        Args:
            gather: Communicates: all ranks must call it. ``False`` leaves each rank its shards, for when a rank may
                have failed.
        """
        while self._undo:
            self._undo.pop()()
        unshard_in_place(self.module, gather)


def shard_module(
    module: nn.Module,
    mesh: DeviceMesh,
    stage: ShardStage,
    *,
    several_backwards: bool = False,
    policy: MixedPrecisionPolicy | None = None,
    offload: bool = False,
    held_elsewhere: Collection[nn.Parameter] = (),
) -> Sharding:
    """Shard ``module`` in place over ``mesh``, block by block.

    All ranks must hold the same values. Tied parameters stay tied. Build optimizers afterwards: the parameters are
    replaced by ``DTensor`` ones of the same names, but for scalars, which stay whole on every rank.

    Args:
        module: The module whose ``forward`` (or a method routed through it) runs the whole step.
        mesh: The ranks that share one copy; or two dimensions, of which the first replicates what the second shares.
        stage: Which ZeRO stage.
        several_backwards: The step steps optimizers by hand between backward passes, so each child of ``module`` is
            gathered when it is called rather than all when ``module`` is.
        policy: Precision of gathered parameters and of the reduction.
        offload: Keep shards, gradients and optimizer state in CPU memory, and step there.
        held_elsewhere: Parameters of other pipeline stages, on the meta device, that are left alone.

    Raises:
        ValueError: A parameter cannot be sharded; names it.

    Example:
        >>> mesh = init_device_mesh("cpu", (2,))  # doctest: +SKIP
        >>> sharding = shard_module(model, mesh, "parameters")  # doctest: +SKIP
        >>> optimizer = torch.optim.AdamW(model.parameters())  # doctest: +SKIP
    """
    check_can_shard(module, held_elsewhere)
    roots: Sequence[nn.Module] = find_independent_children(module) if several_backwards else [module]
    # An optimizer may step between any two calls of such a module: whole parameters kept after one would be stale.
    frees_after_forward = stage == "parameters" or several_backwards
    policy = policy or MixedPrecisionPolicy()
    offload_policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    units = find_shard_units(module)
    # From the inside out, since each call takes what no call before it has taken. Planned whole before the first, so
    # that a refusal leaves the module as it was.
    plan: list[tuple[nn.Module, bool]] = []
    for unit in units:
        plan += [(odd, frees_after_forward) for odd in find_odd_modules(unit)]
        plan.append((unit, frees_after_forward))
    for root in roots:
        if root not in units:
            plan += [(odd, frees_after_forward) for odd in find_odd_modules(root, units)]
            # What belongs to no block is needed first in forward and last in backward: freeing it saves nothing.
            plan.append((root, several_backwards))
    scalars = find_scalars(module)
    ignored = {*held_elsewhere, *scalars}
    for parameter in module.parameters():
        # FSDP2 takes no other strides, which weights of convolutions in `channels_last` have.
        if parameter not in ignored and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.contiguous()
    done: set[nn.Module] = set()
    for part, frees in plan:
        is_complex = any(p.is_complex() for m in part.modules() if m not in done for p in m.parameters(recurse=False))
        done.update(part.modules())
        if not ignored.issuperset(part.parameters()) or part in roots:
            fully_shard(
                part,
                mesh=mesh,
                reshard_after_forward=frees,
                # Autocast leaves complex numbers as they are, and 16 bits would leave out their imaginary parts.
                mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False) if is_complex else policy,
                offload_policy=offload_policy,
                ignored_params=ignored,
            )
    sharded_roots = tuple(root for root in roots if isinstance(root, FSDPModule))
    unused = UnusedParameters(module, mesh)
    return Sharding(module, stage, sharded_roots, unused, [unused.undo, *average_gradients(scalars, mesh)])
