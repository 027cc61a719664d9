"""Choose what to prune: score every element, pool scores into units, and take the lowest until the target is met."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_memopt.compression.finite import check_materialized
from lightning_memopt.compression.patterns import NEVER, Elements, as_canonical, as_pattern, from_canonical
from lightning_memopt.compression.selection import Selection, Weight, WeightFilter
from lightning_memopt.parallel.shards import whole_of_shards

Method = Literal["magnitude", "random", "saliency"]

Scope = Literal["layer", "global"]


@dataclass(frozen=True)
class Choice:
    """How what is pruned is chosen.

    Attributes:
        method: ``"magnitude"`` prunes what is smallest, ``"saliency"`` where weight times gradient is (a first-order
            estimate of what the loss loses, Molchanov et al. 2017, https://arxiv.org/abs/1611.06440), ``"random"``
            anything.
        pattern: What is pruned together; see :func:`~lightning_memopt.compression.patterns.as_pattern`.
        scope: ``"layer"`` prunes the same share of every weight, ``"global"`` the lowest of all.
        seed: Of ``"random"``.

    Raises:
        ValueError: One of them is unknown.
    """

    method: Method = "magnitude"
    pattern: Any = "elements"
    scope: Scope = "layer"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method={self.method!r} is none of {', '.join(map(repr, get_args(Method)))}.")
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope={self.scope!r} is neither 'layer' nor 'global'.")
        object.__setattr__(self, "pattern", as_pattern(self.pattern))

    def select(self, module: nn.Module, which: WeightFilter, sparsity: float) -> Selection:
        """The weights of ``module`` that are pruned so; those that the pattern does not divide are left.

        Raises:
            ValueError: They cannot be pruned so, the pattern does not divide one that ``include`` asks for, or it
                divides none, or nothing would be pruned.
        """
        check_sparsity(sparsity)
        self.pattern.limit(sparsity)
        selection = which.select(module)
        reasons = {weight.name: reason for weight in selection.weights if (reason := self.pattern.why_not(weight))}
        kept = [weight for weight in selection.weights if weight.name not in reasons]
        if reasons and (which.include is not None or not kept):
            name, reason = next(iter(reasons.items()))
            raise ValueError(f"{name!r} {reason}. Choose another pattern, or leave it out with exclude={name!r}.")
        if not self._prunes_any(kept, sparsity):
            raise ValueError(
                f"{sparsity:g} of {kept[0].name!r} and of every other weight is less than pattern={self.pattern} "
                "prunes together, so that nothing would be pruned. Prune more, or choose another pattern."
            )
        for weight in kept:
            if self.method == "saliency" and not weight.parameter.requires_grad:
                raise ValueError(
                    f"{weight.name!r} is frozen and has no gradient, so its saliency is not known. Exclude it, or "
                    "use method='magnitude'."
                )
        return Selection(kept, selection.skipped | reasons)

    def _prunes_any(self, weights: Sequence[Weight], sparsity: float) -> bool:
        sizes = [weight.parameter.numel() for weight in weights]
        budgets = [sum(sizes)] * len(sizes) if self.scope == "global" else sizes
        return any(
            _budget(sparsity, budget) >= self.pattern.together(weight)
            for weight, budget in zip(weights, budgets, strict=True)
        )


def check_sparsity(value: Any, name: str = "amount") -> None:
    """Raise a :class:`ValueError` where ``value`` is no share between nothing and everything."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(
            f"{name}={value!r} is no share of the weights to prune; give a number between 0 and 1, for example 0.5 "
            "for half of them."
        )


@torch.no_grad()
def choose_pruned(
    weights: Sequence[Weight], sparsity: float, choice: Choice, before: Callable[[Weight], Tensor] | None = None
) -> Iterator[tuple[Weight, Tensor]]:
    """Which elements to prune so that a share ``sparsity`` is, in all: a target, not an addition.

    No more is pruned than that, at least one element stays, and ties are broken by position, so that the result
    depends on the values alone. What is found is exact, without a sort and without the scores of all weights at once:
    the threshold is narrowed down byte by byte over histograms.

    Args:
        weights: What to choose from. Sharded ones are gathered one at a time, by all ranks together.
        sparsity: Share of all their elements (for ``scope="layer"`` of each).
        choice: How.
        before: Of a weight, which elements are pruned already, and stay so.

    Returns:
        Each weight with what to prune of it: bool, of its shape, on its device.

    Raises:
        ValueError: A gradient is missing for ``"saliency"``, or a weight is on the meta device.
    """

    @lru_cache(maxsize=1)  # of a single weight they are read once, of many they would not fit
    def keys_of(weight: Weight) -> Tensor:
        return _read_keys(weight, choice, before(weight) if before else None)

    check_materialized((weight.name, weight.parameter) for weight in weights)
    for group in [list(weights)] if choice.scope == "global" else [[weight] for weight in weights]:
        total = sum(weight.parameter.numel() for weight in group)
        budget = _budget(sparsity, total)
        threshold, rest = _find_threshold(group, keys_of, budget)
        for weight in group:
            keys = keys_of(weight)
            units = keys < threshold
            if threshold != NEVER:
                size = weight.parameter.numel() // keys.numel()
                ties = (keys == threshold).view(-1).nonzero().view(-1)[: rest // size]
                units.view(-1)[ties] = True
                rest -= len(ties) * size
            shape = as_canonical(torch.empty(weight.parameter.shape, device="meta"), weight).shape
            yield weight, from_canonical(choice.pattern.spread(units, shape), weight)


def _budget(sparsity: float, total: int) -> int:
    """How many of ``total`` elements may be pruned: less than all."""
    return min(round(sparsity * total), total - 1)


def read_whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all ranks together."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    on_mesh: Any = tensor.to(tensor.device_mesh.device_type)  # of offloaded shards
    return whole_of_shards(on_mesh)


def _read_keys(weight: Weight, choice: Choice, pruned: Tensor | None) -> Tensor:
    """An integer for each unit, ordered as the scores are: 0 for what is pruned already, ``NEVER`` for what stays."""
    pattern: Elements = choice.pattern
    units = pattern.pool(as_canonical(_score(weight, choice), weight).float())
    keys = units.contiguous().view(torch.int32) + 1  # as integers, floats that are not negative keep their order
    if pruned is not None:
        keys[pattern.pool(as_canonical(~pruned.to(keys.device), weight).float()) == 0] = 0
    return pattern.restrict(keys).contiguous()


def _score(weight: Weight, choice: Choice) -> Tensor:
    parameter = weight.parameter
    if choice.method == "random":
        # From the name, so that it does not depend on order, ranks, or what was drawn before.
        generator = torch.Generator().manual_seed(crc32(weight.name.encode()) + choice.seed)
        drawn = torch.rand(parameter.shape, generator=generator).to(parameter.device)
        # What is zero already goes first, and counts: a target is not an addition to what another seed has pruned.
        return torch.where(read_whole(parameter).to(drawn.device) == 0, drawn * 2**-24, drawn)
    if choice.method == "magnitude":
        return read_whole(parameter).abs()
    if parameter.grad is None:
        raise ValueError(
            f"{weight.name!r} has no gradient, so its saliency is not known: it is frozen, was not used, or its "
            "gradient was freed (OptimizerInBackward). Exclude it, or use method='magnitude'."
        )
    return (read_whole(parameter).float() * read_whole(parameter.grad).float()).abs()


def _find_threshold(group: Sequence[Weight], keys_of: Callable[[Weight], Tensor], budget: int) -> tuple[int, int]:
    """The key below which all units are pruned, and how many elements may be pruned of units that have it."""
    prefix, below = 0, 0
    for shift in (24, 16, 8, 0):
        histogram = torch.zeros(256, dtype=torch.long)
        for weight in group:
            keys = keys_of(weight)
            within = keys.view(-1) if shift == 24 else keys[keys >> (shift + 8) == prefix]
            counts = torch.bincount(within >> shift & 255, minlength=256)
            histogram += counts.cpu() * (weight.parameter.numel() // keys.numel())
        cumulative = histogram.cumsum(0) + below
        byte = int(torch.searchsorted(cumulative, budget, right=True))
        below = int(cumulative[byte - 1]) if byte else below
        prefix = prefix * 256 + byte
    return prefix, budget - below
