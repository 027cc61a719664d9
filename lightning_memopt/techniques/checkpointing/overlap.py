"""Refuse to recompute what something else recomputes already."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from lightning_memopt.techniques.checkpointing.selection import Region

_MARK = "_memopt_recomputes"

_CHECKPOINTED_TWICE = (
    "activation checkpointing is on it a second time; use one policy, or give each its own blocks with modules="
)
_BY_HUGGING_FACE = "gradient_checkpointing_enable() was called on its model; turn it off there or leave it to that"


def mark_recomputing(forward: Callable[..., Any]) -> None:
    """Note on a ``forward`` put on an instance that it recomputes what it runs."""
    setattr(forward, _MARK, True)


def refuse_overlap(root: nn.Module, regions: Sequence[Region]) -> None:
    """Refuse regions that are inside of, or hold, what recomputes by itself.

    Nested recomputation runs the inner part a third time and saves next to nothing more.

    Raises:
        ValueError: Names the region, what it meets and who recomputes that.
    """
    others = list(_recomputing(root))
    for region in regions:
        owner = region.module if region.sequential is None else region.sequential
        below = set(owner.modules())
        for name, other, remedy in others:
            if other in below or owner in set(other.modules()):
                raise ValueError(
                    f"{region.name} cannot be recomputed, because {name or type(other).__name__} already is: {remedy}"
                )


def _recomputing(root: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for name, module in root.named_modules():
        if hasattr(vars(module).get("forward"), _MARK):
            yield name, module, _CHECKPOINTED_TWICE
        if getattr(module, "gradient_checkpointing", False) is True:
            yield name, module, _BY_HUGGING_FACE
