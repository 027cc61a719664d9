"""The shapes in which weights are pruned: single elements, n of m, blocks, and whole channels.

A pattern sees a weight as ``(outputs, positions, inputs)``, whichever way it is stored: of a linear layer there is
one position, of a convolution one for each element of its kernel (:func:`as_canonical`).
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_memopt.compression.selection import Weight

GROUPS = (4, 8)
"""Lengths of groups of which n elements are kept, that sparse kernels and the sparse export know."""

NEVER = 2**31 - 1
"""The key of a unit that must not be pruned."""


@dataclass(frozen=True)
class Elements:
    """Single elements anywhere: the most accurate at a given sparsity, small in a sparse export only."""

    def why_not(self, weight: Weight) -> str:
        """What is in the way of pruning ``weight`` so; empty where nothing is."""
        return ""

    def limit(self, sparsity: float) -> None:
        """Raise a :class:`ValueError` where ``sparsity`` cannot be had."""

    def together(self, weight: Weight) -> int:
        """How many elements of ``weight`` are pruned together."""
        return 1

    def pool(self, scores: Tensor) -> Tensor:
        """The scores of what is pruned together, from those of elements (not negative)."""
        return scores

    def restrict(self, keys: Tensor) -> Tensor:
        """``keys`` with ``NEVER`` for what the pattern must keep."""
        return keys

    def spread(self, units: Tensor, shape: torch.Size) -> Tensor:
        """Which elements are pruned, of ``shape``, from which units are."""
        return units


@dataclass(frozen=True)
class Groups(Elements):
    """Of every ``length`` elements along the inputs ``kept`` remain: 2 of 4 is what sparse tensor cores multiply."""

    kept: int = 2
    length: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.kept < self.length:
            raise ValueError(f"{self.kept}:{self.length} keeps no share between none and all of a group.")

    @override
    def why_not(self, weight: Weight) -> str:
        inputs = weight.parameter.shape[weight.input_dim]
        pattern = f"{self.kept}:{self.length}"
        return (
            f"has {inputs} inputs, which {self.length} does not divide: no {pattern}" if inputs % self.length else ""
        )

    @override
    def limit(self, sparsity: float) -> None:
        share = 1 - self.kept / self.length
        if abs(sparsity - share) > 1e-9:
            raise ValueError(
                f"A sparsity of {sparsity:g} is not that of {self.kept}:{self.length}, which is {share:g}. Ask for "
                "that one, or for another pattern."
            )

    @override
    def restrict(self, keys: Tensor) -> Tensor:
        groups = keys.unflatten(-1, (-1, self.length))
        ranks = groups.argsort(dim=-1, stable=True).argsort(dim=-1)
        return groups.masked_fill(ranks >= self.length - self.kept, NEVER).flatten(-2)


@dataclass(frozen=True)
class Blocks(Elements):
    """Blocks of ``rows`` outputs by ``columns`` inputs, judged by their mean."""

    rows: int = 4
    columns: int = 1

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"A block of {self.rows} x {self.columns} has no element; give positive sizes.")

    @override
    def why_not(self, weight: Weight) -> str:
        shape = weight.parameter.shape
        outputs, inputs = shape[weight.output_dim], shape[weight.input_dim]
        if not (outputs % self.rows or inputs % self.columns):
            return ""
        return f"is {outputs} outputs by {inputs} inputs, which blocks of {self.rows} x {self.columns} do not divide"

    @override
    def together(self, weight: Weight) -> int:
        return self.rows * self.columns

    @override
    def pool(self, scores: Tensor) -> Tensor:
        blocks = scores.unflatten(2, (-1, self.columns)).unflatten(0, (-1, self.rows))
        return blocks.mean(dim=(1, 4))

    @override
    def spread(self, units: Tensor, shape: torch.Size) -> Tensor:
        return units.repeat_interleave(self.rows, dim=0).repeat_interleave(self.columns, dim=2)


@dataclass(frozen=True)
class Channels(Elements):
    """Whole outputs or inputs, judged by the mean ``norm``: set to zero, not removed."""

    side: Literal["outputs", "inputs"] = "outputs"
    norm: float = 2

    def __post_init__(self) -> None:
        if self.side not in ("outputs", "inputs") or not self.norm > 0:
            raise ValueError(f"{self} is no pattern: side is 'outputs' or 'inputs', and norm positive.")

    @override
    def together(self, weight: Weight) -> int:
        across = weight.output_dim if self.side == "outputs" else weight.input_dim
        return weight.parameter.numel() // weight.parameter.shape[across]

    @property
    def _across(self) -> tuple[int, int]:
        return (1, 2) if self.side == "outputs" else (0, 1)

    @override
    def pool(self, scores: Tensor) -> Tensor:
        if self.norm == float("inf"):
            return scores.amax(dim=self._across)
        return scores.pow(self.norm).mean(dim=self._across).pow(1 / self.norm)

    @override
    def spread(self, units: Tensor, shape: torch.Size) -> Tensor:
        return (units[:, None, None] if self.side == "outputs" else units[None, None, :]).expand(shape)


def as_pattern(value: Any) -> Elements:
    """The pattern that ``value`` names.

    Args:
        value: ``"elements"``, ``"2:4"`` and the like, ``"4x1"`` and the like (outputs by inputs), ``"outputs"``,
            ``"inputs"``, or a pattern.

    Raises:
        ValueError: It names none.

    Example:
        >>> as_pattern("2:4")
        Groups(kept=2, length=4)
    """
    if isinstance(value, Elements):
        return value
    text = value if isinstance(value, str) else ""
    if text == "elements":
        return Elements()
    if text in ("outputs", "inputs"):
        return Channels(text)  # type: ignore[arg-type]
    if sizes := re.fullmatch(r"(\d+)([:x])(\d+)", text):
        return (Groups if sizes[2] == ":" else Blocks)(int(sizes[1]), int(sizes[3]))
    raise ValueError(
        f"pattern={value!r} is none of 'elements', 'n:m' (such as '2:4'), 'RxC' (blocks of R outputs by C inputs, "
        "such as '4x1'), 'outputs', 'inputs', and the classes of lightning_memopt.compression.patterns."
    )


def as_canonical(tensor: Tensor, weight: Weight) -> Tensor:
    """``tensor``, of the shape of ``weight``, as ``(outputs, positions, inputs)``."""
    moved = tensor.movedim((weight.output_dim, weight.input_dim), (0, -1))
    return moved.reshape(moved.shape[0], -1, moved.shape[-1])


def from_canonical(tensor: Tensor, weight: Weight) -> Tensor:
    """``tensor``, as ``(outputs, positions, inputs)``, in the shape of ``weight``."""
    places = (weight.output_dim, weight.input_dim)
    between = [size for dimension, size in enumerate(weight.parameter.shape) if dimension not in places]
    return tensor.reshape(tensor.shape[0], *between, tensor.shape[-1]).movedim((0, -1), places)
