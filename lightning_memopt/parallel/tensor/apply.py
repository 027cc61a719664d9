"""Apply a tensor parallel plan to a module in place, and undo it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from lightning_memopt.models.hf_experts import read_experts
from lightning_memopt.models.linears import read_linear
from lightning_memopt.parallel.tensor.attention import HeadParallelAttention
from lightning_memopt.parallel.tensor.layers import (
    ChannelParallel,
    ColumnParallel,
    ExpertsParallel,
    RowParallel,
    SplitState,
    VocabParallel,
)
from lightning_memopt.parallel.tensor.plan import TensorPlan, split_dimensions
from lightning_memopt.parallel.tensor.regions import Region, RegionOwner
from lightning_memopt.parallel.unshard import make_whole

_STAND_INS: dict[str, type[nn.Module]] = {
    "colwise": ColumnParallel,
    "rowwise": RowParallel,
    "channels": ChannelParallel,
    "vocab": VocabParallel,
    "attention": HeadParallelAttention,
    "experts": ExpertsParallel,
}


@dataclass
class TensorParallel:
    """A module that is split: says how, and puts it back.

    Attributes:
        module: The module, split in place.
        plan: What was planned.
        regions: The groups of layers, with what was found out about each.
    """

    module: nn.Module
    plan: TensorPlan
    regions: list[Region] = field(default_factory=list)
    _undo: list[Callable[[], Any]] = field(default_factory=list)

    def undo_later(self, step: Callable[[], Any]) -> None:
        """Have ``undo`` take this step too, before those that were given earlier."""
        self._undo.append(step)

    def undo(self, gather: bool = True) -> None:
        """Put classes, hooks and attributes back, and whole plain parameters in place of parts.

        Args:
            gather: Communicates: all ranks of the group must call it. ``False`` leaves each rank its parts, for when
                a rank may have failed.
        """
        while self._undo:
            self._undo.pop()()
        if gather:
            make_whole(self.module)


def tensor_parallelize(module: nn.Module, mesh: DeviceMesh, plan: TensorPlan) -> TensorParallel:
    """Split ``module`` in place as ``plan`` says.

    All ranks must hold the same values. Tied parameters stay tied. Build optimizers afterwards: split parameters
    are replaced by ``DTensor`` ones of the same names. A layer on the meta device is another rank's (a pipeline
    stage's), and left alone. FSDP2 can be applied afterwards on another dimension of the same mesh.

    Args:
        module: The module for which the plan was made.
        mesh: The ranks that split it, one-dimensional; all of them have the same batches.
        plan: From :func:`~lightning_memopt.parallel.tensor.plan.find_tensor_plan`.

    Example:
        >>> mesh = init_device_mesh("cpu", (2,))  # doctest: +SKIP
        >>> split = tensor_parallelize(model, mesh, find_tensor_plan(model, 2))  # doctest: +SKIP
        >>> optimizer = torch.optim.AdamW(model.parameters())  # doctest: +SKIP
    """
    handle = TensorParallel(module, plan)
    _split_parameters(module, mesh, plan)
    for name, entry in plan.entries.items():
        layer = module.get_submodule(name)
        if entry.style != "whole" and not _is_elsewhere(layer):
            experts = read_experts(layer, "moe_tp_experts") if entry.style == "experts" else None
            added_once = experts.added_once if experts is not None else ()
            state = SplitState(mesh, read_linear(layer), entry.pieces, added_once=added_once)
            vars(layer)["_tensor_split"] = state
            handle.undo_later(partial(delattr, layer, "_tensor_split"))
            stand_in(handle, layer, _STAND_INS[entry.style])
            if entry.style == "attention":
                # torch's fused path of evaluation reads the weights, and is not taken where there are hooks.
                handle.undo_later(layer.register_forward_pre_hook(_look_on).remove)
    for submodule in module.modules():
        if isinstance(submodule, nn.TransformerEncoder) and submodule.use_nested_tensor:
            submodule.use_nested_tensor = False
            handle.undo_later(partial(setattr, submodule, "use_nested_tensor", True))
    _join_groups(handle, mesh)
    return handle


def _split_parameters(module: nn.Module, mesh: DeviceMesh, plan: TensorPlan) -> None:
    parts: dict[Tensor, nn.Parameter] = {}
    for name, entry in plan.entries.items():
        holder = module.get_submodule(name)
        for path, (dimension, pieces) in split_dimensions(holder, entry).items():
            parameter = holder.get_parameter(path)
            if parameter.is_meta or parameter in parts:
                continue
            placement: Placement = Shard(dimension) if pieces == 1 else _StridedShard(dimension, split_factor=pieces)
            part = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
            # A view would keep the whole alive.
            part._local_tensor = part._local_tensor.clone(memory_format=torch.contiguous_format)
            parts[parameter] = nn.Parameter(part, requires_grad=parameter.requires_grad)
    for submodule in module.modules():
        for key, whole in list(submodule.named_parameters(recurse=False, remove_duplicate=False)):
            if whole in parts:
                submodule._parameters[key] = parts[whole]


def _join_groups(handle: TensorParallel, mesh: DeviceMesh) -> None:
    by_owner: dict[str, list[Region]] = {}
    for group in handle.plan.groups:
        owner = handle.module.get_submodule(group.owner)
        layers = [handle.module.get_submodule(name) for name in group.names]
        if any(_is_elsewhere(layer) for layer in layers):
            continue
        region = Region(group, owner, mesh, [vars(layer)["_tensor_split"].shape for layer in layers])
        handle.regions.append(region)
        by_owner.setdefault(group.owner, []).append(region)
        for layer in layers:
            vars(layer)["_tensor_split"].region = region
    for name, regions in by_owner.items():
        owner = handle.module.get_submodule(name)
        vars(owner)["_tensor_regions"] = regions
        handle.undo_later(partial(delattr, owner, "_tensor_regions"))
        stand_in(handle, owner, RegionOwner)


def stand_in(handle: TensorParallel, module: nn.Module, kind: type[nn.Module]) -> None:
    """Put ``kind`` in front of the class of ``module`` until ``handle`` is undone.

    A ``kind`` of embedding is put behind a class that is more than ``nn.Embedding``: what that does around the
    lookup (Gemma's and BART's scale, OPT's offset) it then does around that of ``kind``.
    """
    cls = type(module)
    joined: Any = _joined_class
    module.__class__ = joined(kind, cls)
    handle.undo_later(partial(setattr, module, "__class__", cls))


@cache
def _joined_class(kind: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """One class for all modules of ``cls``, under its name: blocks are found by class, and asked for by name."""
    is_behind = issubclass(kind, nn.Embedding) and cls is not nn.Embedding
    bases = (cls, kind) if is_behind else (kind, cls)
    return type(cls.__name__, bases, {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _is_elsewhere(layer: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in layer.parameters())


def _look_on(module: nn.Module, args: Any) -> None:
    return None
