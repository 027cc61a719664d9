"""Remove channels, neurons, heads and width from a module for good: every tensor becomes smaller."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from lightning_memopt.compression.choose import check_sparsity
from lightning_memopt.compression.cutting import Smaller, Trials
from lightning_memopt.compression.finite import check_materialized
from lightning_memopt.compression.first_sizes import first_sizes, remember_sizes
from lightning_memopt.compression.graph import Call
from lightning_memopt.compression.interchangeable import MISPLACED
from lightning_memopt.compression.model_config import update_configs
from lightning_memopt.compression.slots import Slot, UnitGroup
from lightning_memopt.compression.units import find_units
from lightning_memopt.models.compiled import uncompiled
from lightning_memopt.models.experts import holds_experts, output_dim
from lightning_memopt.models.selectors import Selector, as_selectors, matches, show


@dataclass(frozen=True)
class StructuredPruning:
    """What was removed.

    Attributes:
        removed: How many units were there and how many are left, by name of the layer or attention.
        skipped: Why others were left, by name.
        failed: Those of ``skipped`` that were to be removed and without which the module's code does not run, or
            computes something else in another order.
        parameters_before: Number of parameters before, tied ones once.
        parameters_after: The same afterwards.
    """

    removed: Mapping[str, tuple[int, int]]
    skipped: Mapping[str, str]
    failed: Mapping[str, str]
    parameters_before: int
    parameters_after: int


@dataclass(eq=False)
class StructuredPlan:
    """Which units are kept of which group (a mask over its units), and why others are left, by name."""

    kept: list[tuple[UnitGroup, Tensor]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


@torch.inference_mode(mode=False)  # in which no gradient can be followed
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

    Each group of units loses the share ``amount`` of what it had at first, which ``module`` remembers: a target, and
    the same again removes nothing more. Half the channels are a quarter of the weights between them. Heads go whole,
    with the keys that they share, and where an attention is as wide as the stream it reads, the stream keeps the same
    share as the heads. What the model gives out keeps its shape. The smaller module is run once; where its code does
    not bear it, groups are halved until those are found that it does not run without, and these are put back and
    named.

    Args:
        module: Any module whose run torch-pruning can follow.
        amount: Share to be gone, in (0, 1); at least one unit of a group stays.
        call: Runs the module once and returns its outputs or its loss, with gradients:
            ``lambda module: module(batch)``.
        include: Only groups of which one of these modules holds outputs, itself or in a module within it: patterns of
            qualified names, or classes.
        exclude: Not these.
        scores: Importance of each weight, of the parameter's shape; its magnitude where left out.
        optimizers: Their parameters and state are made smaller alike, so that training goes on; state in another
            shape than that of its parameter (packed, factored) begins anew.

    Raises:
        ValueError: ``amount`` is out of bounds, the module cannot be traced, its code runs with nothing of it
            smaller, a selector or everything that it names matches nothing.
        ModuleNotFoundError: torch-pruning is missing.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> prune_structured(net, 0.5, lambda net: net(torch.ones(1, 4))).removed
        {'0': (8, 4)}
    """
    check_sparsity(amount)
    check_materialized(module.named_parameters())
    before, call = _count(module), uncompiled(call)
    plan = plan_structured(module, amount, call, include=include, exclude=exclude, scores=scores)
    misplaced = {name: reason for name, reason in plan.skipped.items() if reason == MISPLACED}
    if not plan.kept:  # all that can be removed has been
        return StructuredPruning({}, plan.skipped, misplaced, before, before)
    trials = Trials(module, call)
    failed: dict[str, str] = {}
    kept = trials.most_that_run([], plan.kept, failed)
    reasons = misplaced | {
        name: f"the code does not run with fewer of it ({error})" for name, error in failed.items()
    }
    if not kept and first_sizes(module):  # what could be removed has been
        return StructuredPruning({}, plan.skipped | reasons, reasons, before, before)
    if not kept:
        raise ValueError(
            f"{type(module).__name__} cannot be made smaller: its code does not run with "
            f"{', '.join(group.name for group, _ in plan.kept)} reduced ({next(iter(failed.values()))}). Exclude "
            'those layers, or prune single weights instead (method="magnitude")'
        )
    smaller = trials.make(kept)
    for optimizer in optimizers:
        _shrink_optimizer(optimizer, smaller)
    configs = update_configs(module, kept, trials.runs)
    removed = {group.name: (group.size, int(mask.sum())) for group, mask in kept}
    remember_sizes(module, {group.name: _size(group) for group, _ in kept})
    return StructuredPruning(removed, plan.skipped | reasons | configs, reasons, before, _count(module))


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
    for group in find_units(module, uncompiled(call)):
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
    first = first_sizes(module)
    reached = False
    for group in groups:
        if group.reason is not None:
            continue
        left = _left(group, amount, first)
        if group.kind == "width" and (share := _shares_of_heads(group, groups, amount, first)):
            left = min(group.size, round(first.get(group.name, group.size) * max(share)))
            if len(share) > 1 or (left == group.size and group.name not in first):
                plan.skipped[group.name] = "attentions of its width keep all heads, or unequal numbers of them"
                continue
        if left == group.size:
            there = first.get(group.name)
            reached |= there is not None
            plan.skipped[group.name] = (
                f"{amount:.0%} of {group.size} is less than one"
                if there is None
                else f"{amount:.0%} of the {there} that there were at first is gone"
            )
            continue
        importance = _importance(group, scores or {})
        mask = torch.zeros(group.size, dtype=torch.bool)
        mask[importance.topk(left).indices] = True
        plan.kept.append((group, mask))
    if not plan.kept and not reached:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in plan.skipped.items())
        no_groups = (
            "no layers were found between what the run begins and ends with: there are none, or its code leaves "
            "autograd, as by detach() or numpy(), so that it cannot be followed"
        )
        raise ValueError(f"nothing in {type(module).__name__} can be removed ({reasons or no_groups})")
    return plan


def _shares_of_heads(
    width: UnitGroup, groups: Sequence[UnitGroup], amount: float, first: Mapping[str, int]
) -> set[float]:
    """What shares of the heads that they had attentions keep that read or write a stream, and were as wide as it."""
    layers = {id(slot.module) for slot in width.slots}
    shares = set()
    for group in groups:
        if group.heads is None or not any(id(slot.module) in layers for slot in group.slots):
            continue
        had = first.get(group.name, _size(group))
        if had * group.heads.size == first.get(width.name, width.size):
            left = group.size if group.reason else _left(group, amount, first)
            shares.add(left * _size(group) / group.size / had)
    return shares


def _size(group: UnitGroup) -> int:
    """How many there are; of heads, those of queries, whatever shares a key: the last key can be that of many."""
    return group.size if group.heads is None else group.heads.queries


def _left(group: UnitGroup, amount: float, first: Mapping[str, int]) -> int:
    """How many units of a group are to be there."""
    whole = first.get(group.name, _size(group)) * group.size / _size(group)
    return min(group.size, max(1, round(whole * (1 - amount) / group.multiple)) * group.multiple)


def _output_dimension(slot: Slot) -> int:
    """The dimension of outputs of the layer that holds the slot's matrix; of vectors the only one."""
    if slot.tensor.ndim < 2:
        return 0
    if holds_experts(slot.module, slot.tensor):
        return output_dim(slot.module)
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


def _shrink_optimizer(optimizer: Optimizer, smaller: Mapping[Tensor, Smaller]) -> None:
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


def _cut_state(state: Mapping[str, Any], parameter: Tensor, change: Smaller) -> dict[str, Any]:
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


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
