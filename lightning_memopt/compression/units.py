"""Which slices of which tensors go together: a channel, a neuron, or a head, wherever it appears in a model.

Channels, neurons and the width of the residual stream are found by torch-pruning's dependency graph (DepGraph,
https://arxiv.org/abs/2301.12900), taught Hugging Face's ``Conv1D``. Attention is not left to the graph, which loses
track of which feature is whose between splits, rotations and repeated keys: heads are read from the layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_memopt.compression.concatenated import complete_copies
from lightning_memopt.compression.fused import Fused, find_fused
from lightning_memopt.compression.graph import Call, follow, is_conv1d, require_torch_pruning
from lightning_memopt.compression.interchangeable import MISPLACED, find_misplaced
from lightning_memopt.compression.packed import PackedWeight
from lightning_memopt.compression.slots import Slot, UnitGroup, join_tied
from lightning_memopt.compression.traceable import traceable
from lightning_memopt.compression.unreached import add_unreached
from lightning_memopt.models.heads import Heads
from lightning_memopt.models.linear_groups import LinearGroup, find_linear_groups
from lightning_memopt.models.linears import read_linear


def find_units(module: nn.Module, call: Call) -> list[UnitGroup]:
    """Find what can be removed from ``module``.

    Args:
        module: Any module; it is run once in evaluation mode, and is as it was afterwards.
        call: Runs it.

    Raises:
        ModuleNotFoundError: torch-pruning is missing; it comes with the extra ``lightning-memopt[prune]``.
        ValueError: The module cannot be traced.
    """
    require_torch_pruning()
    with traceable(module):
        return _find_units(module, call)


def _find_units(module: nn.Module, call: Call) -> list[UnitGroup]:
    names = {id(child): name for name, child in module.named_modules()}
    linears = find_linear_groups(module)
    fused, refuted = find_fused(module, call, linears)
    seen = {one.column for one in (*fused, *refuted)}
    others = [each for each in linears if not any(module.get_submodule(c.name) in seen for c in each.columns)]
    known = [*_find_attentions(module, names, others), *(_read_fused(one) for one in fused)]
    for one in refuted:
        known.append(_read_fused(one))
        known[-1].reason = "where the queries, keys and values of each head lie in the one layer cannot be told"
    inside = {(id(slot.module), slot.name, slot.dimension) for group in known for slot in group.slots}
    groups = []
    columns = [
        slot.module
        for group in known
        for slot in group.slots
        if slot.name == "weight" and slot.dimension == int(is_conv1d(slot.module))
    ]
    attentions = [group for group in known if group.kind == "heads"]
    for group in _find_channels(module, call, names, columns):
        if not any(
            (id(slot.module), slot.name, slot.dimension) in inside for slot in group.slots if _is_matrix(slot)
        ):
            joined = {id(slot.module) for slot in group.slots}
            if any(id(slot.module) in joined for attention in attentions for slot in attention.slots):
                group.kind = "width"
            groups.append(group)
    complete_copies(module, call, groups)
    found = [*known, *join_tied(groups)]
    found += add_unreached(module, found, names)
    for group in found:
        packed = [slot for slot in group.slots if isinstance(slot.tensor, PackedWeight)]
        if packed and group.reason is None:
            name = ".".join(filter(None, (names[id(packed[0].module)], packed[0].name)))
            group.reason = f"{name!r} is quantized, and is not cut; remove first, and quantize then"
    for group in find_misplaced(module, call, [one for one in found if one.reason is None]):
        group.reason = MISPLACED
    return found


def _is_matrix(slot: Slot) -> bool:
    return slot.tensor.ndim > 1


def _read_fused(fused: Fused) -> UnitGroup:
    outputs, inputs = fused.units
    kind: Literal["heads", "channels"] = "channels" if fused.heads is None else "heads"
    group = UnitGroup(fused.owner, kind, int(inputs.max()) + 1, heads=fused.heads)
    group.slots = [*_outputs(fused.column, outputs), *_inputs(fused.row, inputs)]
    return group


def _find_attentions(
    module: nn.Module, names: Mapping[int, str], groups: Sequence[LinearGroup]
) -> Iterator[UnitGroup]:
    """The heads of attentions in linear layers, and of ``nn.MultiheadAttention``."""
    for linears in groups:
        heads = linears.heads
        if heads is None:
            continue
        group = UnitGroup(linears.owner, "heads", heads.keys, heads=heads)
        of_queries = torch.arange(heads.keys).repeat_interleave(heads.width // heads.keys)
        of_keys = torch.arange(heads.keys).repeat_interleave(heads.size)
        for column in linears.columns:
            layer = module.get_submodule(column.name)
            shape = read_linear(layer)
            assert shape is not None
            if column.pieces > 1:
                units = of_queries.repeat(column.pieces)
            elif shape.out_features in (heads.width, heads.keys * heads.size):
                units = of_queries if shape.out_features == heads.width else of_keys
            else:  # each head's queries, keys and values side by side
                units = torch.arange(heads.keys).repeat_interleave(shape.out_features // heads.keys)
            group.slots += _outputs(layer, units)
        row = module.get_submodule(linears.row)
        group.slots += _inputs(row, of_queries)
        yield group
    for child in module.modules():
        if isinstance(child, nn.MultiheadAttention):
            heads = Heads(child.num_heads, child.num_heads, child.head_dim)
            group = UnitGroup(names[id(child)], "heads", heads.keys, heads=heads)
            units = torch.arange(heads.keys).repeat_interleave(heads.size)
            if child.in_proj_weight is None or child.bias_k is not None:
                group.reason = "its queries, keys and values have other widths, or biases of their own"
            else:
                group.slots.append(Slot(child, "in_proj_weight", 0, units.repeat(3)))
                if child.in_proj_bias is not None:
                    group.slots.append(Slot(child, "in_proj_bias", 0, units.repeat(3)))
                group.slots.append(Slot(child.out_proj, "weight", 1, units))
            yield group


def _find_channels(
    module: nn.Module, call: Call, names: Mapping[int, str], columns: Sequence[nn.Module]
) -> Iterator[UnitGroup]:
    """Groups of the dependency graph; it is not asked for those that start within an attention."""
    graph, found, lost = follow(module, call, columns)
    yield from (_read_group(graph, items, names) for items in found)
    for layer in lost:
        reason = "where they go is split in a way that cannot be followed"
        yield UnitGroup(names.get(id(layer), "?"), "channels", 0, reason=reason)


def _read_group(graph: Any, items: Any, names: Mapping[int, str]) -> UnitGroup:
    root, indices = items[0]
    group = UnitGroup(names.get(id(root.target.module), "?"), "channels", len(indices))
    for place, (dependency, indices) in enumerate(items):
        target = dependency.target.module
        if type(target).__name__ == "_OutputOp":
            group.reason = "what the model gives out depends on their number"
            continue
        parents = items[place].root_idxs
        is_output = graph.is_out_channel_pruning_fn(dependency.handler)
        if not isinstance(target, nn.Parameter) and not any(True for _ in _own_tensors(target)):
            continue
        if any(parent is None for parent in parents):
            group.reason = f"which of them {names.get(id(target), 'a parameter')!r} reads cannot be followed"
            continue
        units = {int(index): int(parent) for index, parent in zip(indices, parents, strict=True)}
        if is_output and len(units) > 1 and graph.get_out_channels(dependency.target) == 1:
            continue  # one number for all of them, as of a gate
        is_parameter = isinstance(target, nn.Parameter)
        if is_parameter and target.shape[dependency.target.pruning_dim] == group.size:
            # Where rows are sliced off a table, the graph takes their number for one of features.
            units = {unit: unit for unit in range(group.size)}
        holder, key = _owner(graph.model, target) if is_parameter else (target, "")
        try:
            if is_parameter:
                slots = [_slot(holder, key, dependency.target.pruning_dim, units)]
            else:
                slots = list(_layer_slots(target, units, is_output))
        except IndexError:  # the graph takes one dimension for another, behind a view or in an operator it knows not
            name = ".".join(filter(None, (names.get(id(holder)), key)))
            group.reason = f"which of them {name!r} reads cannot be followed"
            continue
        if not slots:
            group.reason = (
                f"{names.get(id(target), '')!r} is a {type(target).__name__}, whose parts cannot be removed"
            )
        group.slots += slots
    return group


def _layer_slots(layer: nn.Module, units: Mapping[int, int], is_output: bool) -> Iterator[Slot]:
    """Where ``layer`` holds these outputs, or reads these inputs; nothing for a layer of a kind not known here."""
    if isinstance(layer, nn.MultiheadAttention):
        if layer.in_proj_weight is not None:
            yield _slot(layer, "in_proj_weight", 1, units)
            yield _slot(layer.out_proj, "weight", 0, units)
            if layer.out_proj.bias is not None:
                yield _slot(layer.out_proj, "bias", 0, units)
    elif isinstance(layer, _ConvNd):
        depthwise = layer.groups == layer.in_channels == layer.out_channels and layer.groups > 1
        if layer.groups > 1 and not depthwise:
            return
        if is_output or depthwise:
            yield _slot(layer, "weight", int(layer.transposed and not depthwise), units)
            if layer.bias is not None:
                yield _slot(layer, "bias", 0, units)
        else:
            yield _slot(layer, "weight", 1 - int(layer.transposed), units)
    elif isinstance(layer, nn.Linear) or is_conv1d(layer):
        places = (_outputs if is_output else _inputs)(layer, torch.empty(0))
        yield from (_slot(slot.module, slot.name, slot.dimension, units) for slot in places)
    elif isinstance(layer, _NormBase | nn.PReLU):
        for name, tensor in _own_tensors(layer):
            if tensor.numel() > 1 or (isinstance(layer, _NormBase) and tensor.ndim):
                yield _slot(layer, name, 0, units)
    elif isinstance(layer, nn.LayerNorm | nn.RMSNorm) and len(layer.normalized_shape) == 1:
        yield from (_slot(layer, name, 0, units) for name, _ in _own_tensors(layer))
    elif isinstance(layer, nn.Embedding):
        yield _slot(layer, "weight", 1, units)


def _slot(module: nn.Module, name: str, dimension: int, units: Mapping[int, int]) -> Slot:
    of = torch.full((getattr(module, name).shape[dimension],), -1)
    of[list(units)] = torch.tensor(list(units.values()))
    return Slot(module, name, dimension, of)


def _outputs(layer: nn.Module, units: Tensor) -> list[Slot]:
    slots = [Slot(layer, "weight", 1 if is_conv1d(layer) else 0, units)]
    return slots if layer.bias is None else [*slots, Slot(layer, "bias", 0, units)]


def _inputs(layer: nn.Module, units: Tensor) -> list[Slot]:
    return [Slot(layer, "weight", 0 if is_conv1d(layer) else 1, units)]


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _owner(model: nn.Module, parameter: nn.Parameter) -> tuple[nn.Module, str]:
    for module in model.modules():
        for name, other in module._parameters.items():
            if other is parameter:
                return module, name
    raise LookupError("a parameter of the trace is no parameter of the model")
