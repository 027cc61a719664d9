"""Per policy: what does this region keep in this call?"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_memopt.memory.report import format_bytes
from lightning_memopt.techniques.checkpointing.budget import BudgetPlan, Keep, plan_budget, products_to_keep
from lightning_memopt.techniques.checkpointing.profile import RegionProfile, is_split, profile_region
from lightning_memopt.techniques.checkpointing.selection import Region
from lightning_memopt.techniques.host_random import generators_among, generators_of, host_random_kept

logger = logging.getLogger(__name__)

NOTHING: Keep = {}


@dataclass(frozen=True)
class Call:
    """A call of a region about to run: its region, the module to profile and the arguments."""

    region: Region
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def module(self) -> nn.Module:
        """What the region runs."""
        return self.region.module


class KeepNothing:
    """Full recomputation."""

    def choose(self, call: Call) -> Keep | None:
        """What to keep of this call; None where the region is not to be checkpointed."""
        return NOTHING

    def has_run(self, call: Call) -> None:
        """The forward of a checkpointed call has ended."""

    def replay_started(self) -> None:
        """A backward has reached a checkpointed region."""


class KeepProducts(KeepNothing):
    """The selective policy: profile each distinct block once, keep its products.

    A split block finds out in its first call, on values, how its layers work together: it is recomputed in full once
    and looked at then, since a look on fake tensors before would settle that without values.
    """

    def __init__(self) -> None:
        self._profiles = Profiles()
        self._keep: dict[tuple[str, bool], Keep] = {}

    def choose(self, call: Call) -> Keep | None:
        """The products of the region, found at its first call."""
        if self._key(call) not in self._keep and not is_split(call.module):
            self._look_at(call)
        return self._keep.get(self._key(call), NOTHING)

    def has_run(self, call: Call) -> None:
        """Look at a split region."""
        if self._key(call) not in self._keep:
            self._look_at(call)

    def _look_at(self, call: Call) -> None:
        profile = self._profiles.of(call)
        self._keep[self._key(call)] = NOTHING if profile is None else products_to_keep(profile)

    def _key(self, call: Call) -> tuple[str, bool]:
        return call.region.name, call.module.training


class KeepWithinBudget(KeepNothing):
    """The budget policy: recompute everything in the first step and profile it, then keep what the budget allows.

    A region that is first called later (the discriminator of a GAN) is taken up in the same way.
    """

    def __init__(self, budget: float) -> None:
        self.plan: BudgetPlan | None = None
        self._budget = budget
        self._profiles = Profiles()
        self._found: dict[str, RegionProfile | None] = {}
        self._calls: dict[str, int] = {}
        self._keep: dict[str, Keep | None] = {}
        self._step_ended = False

    def choose(self, call: Call) -> Keep | None:
        """What the plan says, or nothing kept until there is one for the region."""
        name = call.region.name
        if self._step_ended and len(self._keep) < len(self._found):
            self._solve()
        if name not in self._keep:
            self._calls[name] = self._calls.get(name, 0) + 1
            self._step_ended = False
        return self._keep.get(name, NOTHING)

    def has_run(self, call: Call) -> None:
        """Look at a region after its first call, in which a split one finds out how its layers work together."""
        if call.region.name not in self._found:
            self._found[call.region.name] = self._profiles.of(call)

    def replay_started(self) -> None:
        """The forward of the step is over: all of its regions have been profiled."""
        self._step_ended = True

    def _solve(self) -> None:
        self._keep = dict.fromkeys(self._found, NOTHING)
        known = {name: profile for name, profile in self._found.items() if profile is not None}
        self.plan = plan_budget([(p, self._calls[name]) for name, p in known.items()], self._budget)
        self._keep.update(zip(known, self.plan.keep, strict=True))
        if self.plan.peak_bytes > self._budget * self.plan.plain_bytes:
            logger.warning(
                "a budget of %.2f of the activation memory is %s, and recomputing everything still holds %s (%.2f)",
                self._budget,
                format_bytes(self._budget * self.plan.plain_bytes),
                format_bytes(self.plan.peak_bytes),
                self.plan.peak_bytes / self.plan.plain_bytes,
            )


class Profiles:
    """Profiles of regions, one for all that are built alike and called alike."""

    def __init__(self) -> None:
        self._by_signature: dict[Any, RegionProfile | None] = {}

    def of(self, call: Call) -> RegionProfile | None:
        """The profile of this region, or None (and one warning) if it cannot run on fake tensors."""
        signature = _signature(call)
        if signature not in self._by_signature:
            try:
                # Torch's global ones are not asked by fake tensors.
                given = generators_among(tree_leaves((call.args, dict(call.kwargs))))
                with host_random_kept([*generators_of(call.module), *given]):
                    self._by_signature[signature] = profile_region(call.module, call.args, call.kwargs)
            except Exception as error:
                # Recomputing all of it is always right; a module that branches on values must not end the training.
                logger.warning(
                    "%s cannot be profiled on fake tensors (%s: %s); it is recomputed in full",
                    call.region.name, type(error).__name__, str(error).partition("\n")[0],
                )  # fmt: skip
                self._by_signature[signature] = None
        return self._by_signature[signature]


def _signature(call: Call) -> Any:
    leaves = tree_leaves((call.args, dict(call.kwargs)))
    return (
        tuple(type(module) for module in call.module.modules()),
        tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in call.module.named_parameters()),
        tuple(
            (leaf.shape, leaf.dtype, leaf.requires_grad) if hasattr(leaf, "shape") else type(leaf) for leaf in leaves
        ),
        call.module.training,
    )
