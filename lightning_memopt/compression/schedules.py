"""How sparse a model is to be at each step: absolute targets, never amounts on top of what is pruned already."""

from dataclasses import dataclass
from typing import Any, Protocol

from lightning_memopt.compression.choose import check_sparsity


class SparsitySchedule(Protocol):
    """What :class:`~lightning_memopt.callbacks.gradual_pruning.GradualPruning` asks of a schedule."""

    @property
    def final_sparsity(self) -> float:
        """The last and highest target."""

    @property
    def begin_step(self) -> int:
        """The number of optimizer steps after which the first target holds."""

    @property
    def end_step(self) -> int:
        """The number of optimizer steps after which the last target holds."""

    def at(self, step: int) -> float:
        """The target after ``step`` optimizer steps: 0 before the first, and never falling."""


@dataclass(frozen=True)
class ConstantSparsity:
    """One target from ``begin_step`` on.

    Args:
        sparsity: Above 0 and below 1, as a share of the weights.
        begin_step: Optimizer steps before it holds.

    Raises:
        ValueError: A fraction or a step outside its range.

    Example:
        >>> [ConstantSparsity(0.5, begin_step=10).at(step) for step in (9, 10)]
        [0.0, 0.5]
    """

    sparsity: float
    begin_step: int = 0

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, "sparsity")
        check_step(self.begin_step, "begin_step")

    @property
    def final_sparsity(self) -> float:
        """The target."""
        return self.sparsity

    @property
    def end_step(self) -> int:
        """As ``begin_step``."""
        return self.begin_step

    def at(self, step: int) -> float:
        """The target after ``step`` optimizer steps."""
        return self.sparsity if step >= self.begin_step else 0.0


@dataclass(frozen=True)
class PolynomialSparsity:
    """From ``initial`` to ``final`` over the steps from ``begin_step`` to ``end_step``, fast at first.

    Zhu and Gupta 2017 (https://arxiv.org/abs/1710.01878): ``final + (initial - final) * (1 - t) ** power`` with ``t``
    the share of the way, raised every ``frequency`` steps.

    Args:
        initial: From 0, and below ``final``.
        final: Below 1.
        begin_step: Optimizer steps before ``initial`` holds.
        end_step: Optimizer steps before ``final`` holds. Leave some for the weights that remain to recover.
        power: 3 prunes most while there is much to prune; 1 is linear.
        frequency: Optimizer steps between targets.

    Raises:
        ValueError: One of them is out of range.

    Example:
        >>> schedule = PolynomialSparsity(0.0, 0.8, begin_step=0, end_step=1000)
        >>> [round(schedule.at(step), 3) for step in (0, 100, 199, 500, 1000)]
        [0.0, 0.217, 0.217, 0.7, 0.8]
    """

    initial: float
    final: float
    begin_step: int
    end_step: int
    power: float = 3
    frequency: int = 100

    def __post_init__(self) -> None:
        check_sparsity(self.final, "final")
        check_step(self.begin_step, "begin_step")
        check_step(self.end_step, "end_step")
        check_step(self.frequency, "frequency")
        if self.initial != 0:
            check_sparsity(self.initial, "initial")
        if self.initial >= self.final:
            raise ValueError(
                f"initial={self.initial!r} is not below final={self.final!r}; what is pruned stays pruned, "
                "so sparsity can only grow."
            )
        is_number = isinstance(self.power, int | float)
        if self.end_step <= self.begin_step or self.frequency < 1 or not (is_number and self.power > 0):
            raise ValueError(
                f"{self} has no way to go: end_step must be after begin_step, frequency at least 1, power positive."
            )

    @property
    def final_sparsity(self) -> float:
        """As ``final``."""
        return self.final

    def at(self, step: int) -> float:
        """The target after ``step`` optimizer steps."""
        if step < self.begin_step:
            return 0.0
        if step >= self.end_step:
            return self.final
        done = (step - self.begin_step) // self.frequency * self.frequency / (self.end_step - self.begin_step)
        return self.final + (self.initial - self.final) * (1 - done) ** self.power


def check_step(value: Any, name: str) -> None:
    """Raise a :class:`ValueError` where ``value`` is no number of optimizer steps."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}={value!r} is no number of optimizer steps; give a whole number from 0.")


def check_schedule(schedule: Any) -> None:
    """Raise a :class:`ValueError` where ``schedule`` is none."""
    if not all(hasattr(schedule, name) for name in ("at", "final_sparsity", "begin_step", "end_step")):
        raise ValueError(
            f"schedule={schedule!r} is no schedule; give ConstantSparsity(0.5), or PolynomialSparsity(0.0, 0.8, "
            "begin_step=0, end_step=1000)."
        )
