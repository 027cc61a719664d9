"""Remove channels, neurons, heads and width from a module for good: every tensor becomes smaller."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from lightning_memopt.compression.model_config import update_configs
from lightning_memopt.compression.units import Call, Slot, UnitGroup, find_units, output_tensors
from lightning_memopt.models.selectors import Selector, as_selectors, matches, show

_WIDTH_NAMES = ("dim", "size", "width", "features", "channels", "hidden", "embed", "d_model", "inner")
_NO_WIDTHS = (
    "vocab",
    "image",
    "patch",
    "block_size",
    "head_size",
    "head_dim",
    "dim_head",
    "kernel",
    "chunk",
    "batch",
)


@dataclass(frozen=True)
class StructuredPruning:
    """What was removed.

    Attributes:
        removed: How many units were there and how many are left, by name of the layer or attention.
        skipped: Why others were left, by name.
        parameters_before: Number of parameters before, tied ones once.
        parameters_after: The same afterwards.
    """

    removed: Mapping[str, tuple[int, int]]
    skipped: Mapping[str, str]
    parameters_before: int
    parameters_after: int


@dataclass(eq=False)
class StructuredPlan:
    """Which units are kept of which group (a mask over its units), and why others are left, by name."""

    kept: list[tuple[UnitGroup, Tensor]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def prune_structured(
    module: nn.Module,
    amount: float,
    call: Call,
    *,
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
    scores: Mapping[nn.Parameter, Tensor] | None = None,
    optimizers: Sequence[Optimizer] = (),
) -> StructuredPruning:
    """Remove the least important channels, neurons, heads and features of the residual stream, in place.

    Each group of units loses the share ``amount``: half the channels are a quarter of the weights between them. Heads
    go whole, with the keys that they share, and where an attention is as wide as the stream it reads, the stream
    keeps the same share as the heads. What the model gives out keeps its shape. The smaller module is run once; if
    its code does not bear it, all is put back.

    Args:
        module: Any module whose run torch-pruning can follow.
        amount: Share to remove, in (0, 1); at least one unit of a group stays.
        call: Runs the module once and returns its outputs or its loss, with gradients:
            ``lambda module: module(batch)``.
        include: Only groups of which one of these modules holds outputs, itself or in a module within it: patterns of
            qualified names, or classes.
        exclude: Not these.
        scores: Importance of each weight, of the parameter's shape; its magnitude where left out.
        optimizers: Their parameters and state are made smaller alike, so that training goes on; state in another
            shape than that of its parameter (packed, factored) begins anew.

    Raises:
        ValueError: ``amount`` is out of bounds, the module cannot be traced, its code cannot run smaller, a selector
            or everything that it names matches nothing.
        ModuleNotFoundError: torch-pruning is missing.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> prune_structured(net, 0.5, lambda net: net(torch.ones(1, 4))).removed
        {'0': (8, 4)}
    """
    if not 0 < amount < 1:
        raise ValueError(f"amount={amount!r} is no share that can be removed; give a number between 0 and 1")
    before = _count(module)
    plan = plan_structured(module, amount, call, include=include, exclude=exclude, scores=scores)
    shapes = _output_shapes(module, call)
    failures = []
    for numbers in _ways(module, plan):
        undo = _Undo()
        smaller = _apply(module, plan, numbers, undo)
        try:
            if _output_shapes(module, call) != shapes:
                raise RuntimeError("its outputs have another shape")
        except Exception as error:
            undo.run()
            failures.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        for optimizer in optimizers:
            _shrink_optimizer(optimizer, smaller)
        removed = {group.name: (group.size, int(mask.sum())) for group, mask in plan.kept}
        configs = update_configs(module, plan.kept, lambda: _runs(module, call, shapes))
        return StructuredPruning(removed, plan.skipped | configs, before, _count(module))
    raise ValueError(
        f"{type(module).__name__} cannot be made smaller: its code does not run with "
        f"{', '.join(group.name for group, _ in plan.kept)} reduced ({failures[0]}). Exclude those layers, or prune "
        'single weights instead (method="magnitude")'
    )


def plan_structured(
    module: nn.Module,
    amount: float,
    call: Call,
    *,
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
    scores: Mapping[nn.Parameter, Tensor] | None = None,
) -> StructuredPlan:
    """Choose what to keep; nothing is changed. Arguments and errors are those of :func:`prune_structured`."""
    chosen = None if include is None else as_selectors(include, "include")
    barred = [] if exclude is None else as_selectors(exclude, "exclude")
    names = {id(child): name for name, child in module.named_modules()}
    for selector in (*(chosen or ()), *barred):
        if not any(matches(name, child, selector) for name, child in module.named_modules()):
            raise ValueError(f"{show(selector)!r} matches no module of {type(module).__name__}")
    plan = StructuredPlan()
    groups = []
    for group in find_units(module, call):
        layers = {id(slot.module) for slot in group.slots if slot.dimension == _output_dimension(slot)}
        named = [place for key in layers for place in _path(module, names[key])]
        if group.reason is None and group.size < 2:
            group.reason = "there is only one"
        if group.reason is None and chosen is not None and not _any(named, chosen):
            group.reason = "not in include"
        if group.reason is None and _any(named, barred):
            group.reason = "in exclude"
        if group.reason is not None:
            plan.skipped[group.name] = group.reason
        groups.append(group)
    shares: dict[int, set[float]] = {}
    for group in groups:
        if group.kind == "heads" and group.heads is not None:
            left = group.size if group.reason else max(1, round(group.size * (1 - amount)))
            shares.setdefault(group.heads.width, set()).add(left / group.size)
    for group in groups:
        if group.reason is not None:
            continue
        left = max(1, round(group.size * (1 - amount)))
        if group.kind == "width" and group.size in shares:
            share = shares[group.size]
            left = round(group.size * max(share))
            if len(share) > 1 or left == group.size:
                plan.skipped[group.name] = "attentions of its width keep all heads, or unequal numbers of them"
                continue
        if left == group.size:
            plan.skipped[group.name] = f"{amount:.0%} of {group.size} is less than one"
            continue
        importance = _importance(group, scores or {})
        mask = torch.zeros(group.size, dtype=torch.bool)
        mask[importance.topk(left).indices] = True
        plan.kept.append((group, mask))
    if not plan.kept:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in plan.skipped.items())
        raise ValueError(f"nothing in {type(module).__name__} can be removed ({reasons or 'it has no layers'})")
    return plan


def _output_dimension(slot: Slot) -> int:
    """The dimension of outputs of the layer that holds the slot's matrix; of vectors the only one."""
    if slot.tensor.ndim < 2:
        return 0
    if isinstance(slot.module, nn.Embedding):
        return 1
    if isinstance(slot.module, _ConvNd):
        return int(slot.module.transposed)
    return 1 if type(slot.module).__name__ == "Conv1D" else 0


def _path(root: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The module of that name, and all that it is in."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        prefix = ".".join(parts[:length])
        yield prefix, root.get_submodule(prefix)


def _any(named: Sequence[tuple[str, nn.Module]], selectors: Sequence[Selector]) -> bool:
    return any(matches(name, layer, selector) for name, layer in named for selector in selectors)


def _importance(group: UnitGroup, scores: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """The mean over matrices of each unit's share of the energy in them (https://arxiv.org/abs/2301.12900, eq. 4)."""
    total = torch.zeros(group.size)
    seen = set()
    for slot in group.slots:
        tensor = slot.tensor
        if tensor.ndim < 2 or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        values = scores[tensor] if tensor in scores else tensor.detach()  # type: ignore[index]
        rows = values.float().pow(2).movedim(slot.dimension, 0).flatten(1).sum(1).cpu()
        inside = slot.units >= 0
        energy = torch.zeros(group.size).index_add_(0, slot.units[inside], rows[inside])
        total += energy / energy.mean().clamp_min(1e-12)
    return total


Numbers = list[tuple[nn.Module, str, Any]]


def _ways(module: nn.Module, plan: StructuredPlan) -> Iterator[Numbers]:
    """What to set integers that code reads to, to be tried in order: counts of heads first, since heads keep size."""
    counts: Numbers = []
    widths: dict[tuple[int, str], tuple[nn.Module, str, int]] = {}
    new_sizes: dict[int, int] = {}
    for group, mask in plan.kept:
        left = int(mask.sum())
        if group.heads is not None:
            owner = module.get_submodule(group.name)
            repeated = group.heads.queries // group.heads.keys
            inner = {group.heads.width: left * repeated * group.heads.size}
            inner[group.heads.keys * group.heads.size] = left * group.heads.size
            for child in owner.modules():
                for name, value in _integers(child):
                    if "head" in name and value in (group.heads.queries, group.heads.keys) and _counts(name):
                        is_of_keys = value == group.heads.keys and ("key" in name or "kv" in name)
                        counts.append((child, name, left if is_of_keys else left * repeated))
                    elif value in inner and _is_width(name):
                        widths[id(child), name] = (child, name, inner[value])
        elif group.kind == "width":
            new_sizes[group.size] = left
    stream: Numbers = [
        (child, name, new_sizes[value])
        for child in module.modules()
        for name, value in _integers(child)
        if value in new_sizes and _is_width(name) and (id(child), name) not in widths
    ]
    yield counts
    if widths:
        yield [*counts, *widths.values()]
    if stream:
        yield [*counts, *widths.values(), *stream]


def _integers(module: nn.Module) -> list[tuple[str, int]]:
    """A module's own integers, without those of torch's layers, which are read off their tensors."""
    if type(module).__module__.startswith("torch.") or type(module).__name__ == "Conv1D":
        return []
    return [(name, value) for name, value in vars(module).items() if type(value) is int]


def _counts(name: str) -> bool:
    return "dim" not in name and "size" not in name


def _is_width(name: str) -> bool:
    return any(part in name for part in _WIDTH_NAMES) and not any(part in name for part in _NO_WIDTHS)


class _Undo:
    """Puts back attributes, last first."""

    def __init__(self) -> None:
        self._old: list[tuple[nn.Module, str, Any]] = []

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        self._old.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def run(self) -> None:
        for module, name, value in reversed(self._old):
            setattr(module, name, value)


@dataclass(frozen=True)
class _Smaller:
    """What became of a tensor: the new one, and what was kept along which dimensions."""

    new: Tensor
    kept: Mapping[int, Tensor]

    def cut(self, tensor: Tensor) -> Tensor:
        for dimension, mask in self.kept.items():
            tensor = tensor.index_select(dimension, mask.nonzero().view(-1).to(tensor.device))
        return tensor


def _apply(module: nn.Module, plan: StructuredPlan, numbers: Numbers, undo: _Undo) -> dict[Tensor, _Smaller]:
    masks: dict[Tensor, dict[int, Tensor]] = {}
    for group, kept in plan.kept:
        for slot in group.slots:
            mask = (slot.units < 0) | kept[slot.units.clamp_min(0)]
            along = masks.setdefault(slot.tensor, {})
            along[slot.dimension] = along[slot.dimension] & mask if slot.dimension in along else mask
    smaller: dict[Tensor, _Smaller] = {}
    for tensor, along in masks.items():
        cut = _Smaller(tensor, along).cut
        new = cut(tensor.detach()).clone(memory_format=torch.contiguous_format)
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, tensor.requires_grad)
            new.grad = None if tensor.grad is None else cut(tensor.grad)
        smaller[tensor] = _Smaller(new, along)
    for child in module.modules():  # wherever a tensor is registered, tied ones twice
        held = (*child._parameters.items(), *child._buffers.items())
        found = [(name, smaller[tensor].new) for name, tensor in held if tensor is not None and tensor in smaller]
        for name, new in found:
            undo.set(child, name, new)
        if found:
            for name, value in _sizes_of(child):
                undo.set(child, name, value)
    for child in module.modules():
        if isinstance(child, nn.MultiheadAttention) and child.in_proj_weight is not None:
            for name, value in _sizes_of(child):
                undo.set(child, name, value)
    for child, name, value in numbers:
        undo.set(child, name, value)
    return smaller


def _sizes_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes of torch's layers that say how large their tensors are."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.MultiheadAttention):
        assert module.in_proj_weight is not None
        inner, width = module.in_proj_weight.shape
        yield from {"embed_dim": width, "kdim": width, "vdim": width}.items()
        yield "num_heads", inner // 3 // module.head_dim
    elif weight is None:
        if isinstance(module, _NormBase) and module.running_mean is not None:
            yield "num_features", len(module.running_mean)
    elif isinstance(module, nn.Linear):
        yield from {"out_features": weight.shape[0], "in_features": weight.shape[1]}.items()
    elif isinstance(module, _ConvNd):
        depthwise = module.groups > 1
        outputs, inputs = (weight.shape[1], weight.shape[0]) if module.transposed else weight.shape[:2]
        if depthwise:
            outputs = inputs = weight.shape[0]
            yield "groups", outputs
        yield from {"out_channels": outputs, "in_channels": inputs}.items()
    elif isinstance(module, nn.LayerNorm):
        yield "normalized_shape", tuple(weight.shape)
    elif isinstance(module, _NormBase):
        yield "num_features", len(weight)
    elif isinstance(module, nn.Embedding):
        yield "embedding_dim", weight.shape[1]
    elif isinstance(module, nn.PReLU):
        yield "num_parameters", len(weight)
    elif type(module).__name__ == "Conv1D":
        yield from {"nx": weight.shape[0], "nf": weight.shape[1]}.items()


def _shrink_optimizer(optimizer: Optimizer, smaller: Mapping[Tensor, _Smaller]) -> None:
    """Hand the optimizer the smaller parameters, and cut its moments as they were cut."""
    for group in optimizer.param_groups:
        for place, parameter in enumerate(group["params"]):
            if parameter not in smaller:
                continue
            change = smaller[parameter]
            group["params"][place] = change.new
            state = optimizer.state.pop(parameter, None)
            if state and (cut := _cut_state(state, parameter, change)):
                optimizer.state[change.new] = cut


def _cut_state(state: Mapping[str, Any], parameter: Tensor, change: _Smaller) -> dict[str, Any]:
    """The state of what is left of a parameter; none where it is packed or factored, and so begins anew."""
    cut: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            cut[name] = change.cut(value).clone()
        elif isinstance(value, Mapping) or (isinstance(value, Tensor) and value.numel() > 1):
            return {}
        else:
            cut[name] = value
    return cut


def _output_shapes(module: nn.Module, call: Call) -> list[torch.Size]:
    modes = {child: child.training for child in module.modules()}
    try:
        module.eval()
        with torch.enable_grad():
            return [tensor.shape for tensor in output_tensors(call(module))]
    finally:
        for child, mode in modes.items():
            child.training = mode


def _runs(module: nn.Module, call: Call, shapes: list[torch.Size]) -> bool:
    try:
        return _output_shapes(module, call) == shapes
    except Exception:
        return False


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
