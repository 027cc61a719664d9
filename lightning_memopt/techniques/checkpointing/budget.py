"""Choose what to keep of each region: for the selective policy by kind, for the budget policy by time per byte."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_memopt.techniques.checkpointing.profile import Operator, RegionProfile

Keep = Mapping[Any, frozenset[int]]
"""Operator -> which of its calls in a region are kept; everything else is recomputed."""


@dataclass(frozen=True)
class BudgetPlan:
    """What the budget policy decided.

    Attributes:
        keep: For each region what it keeps, or None where it keeps everything and is not checkpointed.
        plain_bytes: What plain training saves in all regions.
        peak_bytes: What is held at the worst moment of the backward under this plan.
    """

    keep: tuple[Keep | None, ...]
    plain_bytes: int
    peak_bytes: int


def products_to_keep(profile: RegionProfile) -> Keep:
    """The matrix products, convolutions and attention results that are worth their memory.

    - A product that the backward reads, or something computed from it alone, is kept: keeping it costs little beyond
      what plain training saves. Not so if it is cheap for its size, with less than half of the floating-point
      operations per byte of the region's products together (the attention scores, where they exist as a tensor).
    - A product that only feeds a sum with other activations (the output projection of attention) is new memory. It is
      kept only where it has more operations per byte than the former have (their median, by bytes).
    - A product after the last tensor that the backward needs is never run again and never kept.
    """
    products = [op for op in profile.operators if op.flops and op.keepable and op.replayed]
    total_bytes = sum(op.kept_bytes for op in products)
    average = sum(op.flops for op in products) / total_bytes if total_bytes else 0.0
    read = [op for op in products if op.is_read and _intensity(op) >= average / 2]
    bar = _median_intensity(read)
    return _by_operator([op for op in products if op in read or (not op.is_read and _intensity(op) > bar)])


def _intensity(op: Operator) -> float:
    return op.flops / op.kept_bytes


def _median_intensity(operators: Sequence[Operator]) -> float:
    half = sum(op.kept_bytes for op in operators) / 2
    below = 0
    for op in sorted(operators, key=_intensity):
        below += op.kept_bytes
        if below >= half:
            return _intensity(op)
    return 0.0


def plan_budget(profiles: Sequence[tuple[RegionProfile, int]], budget: float) -> BudgetPlan:
    """Choose what each region keeps so that the peak of the regions stays below a fraction of the plain one.

    Greedy, by time saved per byte kept, on the peak as it will be: while region ``r`` runs its backward, what regions
    ``1..r`` keep is held, and what region ``r`` recomputes. The time lost is a sum over operators, so that this is a
    knapsack, for which the greedy choice is within one item of the optimum.

    Args:
        profiles: For each region in the order of the forward its profile and how many times a step calls it.
        budget: Fraction in (0, 1] of the bytes that plain training saves in the regions.
    """
    held = [_Held(profile, calls) for profile, calls in profiles]
    plain = sum(region.input_bytes + region.missing_bytes for region in held)
    candidates = [
        (op.cost / op.kept_bytes, index, op)
        for index, (profile, _) in enumerate(profiles)
        for op in profile.operators
        if op.keepable and op.replayed and op.kept_bytes
    ]
    for _, index, op in sorted(candidates, key=lambda candidate: (-candidate[0], candidate[1])):
        held[index].add(op)
        if _peak(held) > budget * plain:
            held[index].drop(op)
    keep = tuple(None if region.missing_bytes == 0 else _by_operator(region.kept) for region in held)
    return BudgetPlan(keep, plain, _peak(held))


class _Held:
    """What one region holds: always its input, what was chosen, and while it is recomputed what is missing."""

    def __init__(self, profile: RegionProfile, calls: int) -> None:
        self.calls = calls
        self.input_bytes = profile.input_bytes * calls
        self.kept: list[Operator] = []
        self.kept_bytes = 0
        self.missing_bytes = profile.plain_bytes * calls

    def add(self, op: Operator) -> None:
        self.kept.append(op)
        self._move(op, 1)

    def drop(self, op: Operator) -> None:
        self.kept.remove(op)
        self._move(op, -1)

    def _move(self, op: Operator, sign: int) -> None:
        self.kept_bytes += sign * op.kept_bytes * self.calls
        self.missing_bytes -= sign * op.needed_bytes * self.calls


def _peak(held: Sequence[_Held]) -> int:
    peak = below = 0
    for region in held:
        below += region.input_bytes + region.kept_bytes
        # A region that is called several times recomputes one call at a time.
        peak = max(peak, below + region.missing_bytes // region.calls)
    return peak


def _by_operator(operators: Sequence[Operator]) -> Keep:
    keep: dict[Any, set[int]] = {}
    for op in operators:
        func, ordinal = op.key
        keep.setdefault(func, set()).add(ordinal)
    return {func: frozenset(ordinals) for func, ordinals in keep.items()}
