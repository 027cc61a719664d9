"""What a user may ask of activation checkpointing, checked."""

from dataclasses import dataclass
from typing import Literal, get_args

Policy = Literal["full", "every_k", "selective", "budget", "auto"]
POLICIES: tuple[str, ...] = get_args(Policy)


@dataclass(frozen=True)
class Recompute:
    """How much to recompute in the backward.

    Attributes:
        policy: ``"full"`` recomputes every region; ``"every_k"`` leaves every ``k``-th alone and recomputes the
            others; ``"selective"`` keeps the matrix products and attention results that the backward reads and
            recomputes the rest; ``"budget"`` keeps as much as a fraction of the activation memory allows;
            ``"auto"`` is ``"selective"`` for blocks and ``"full"`` for segments of a plain ``nn.Sequential`` and for
            recurrent layers.
        k: For ``"every_k"``: a number of blocks, at least 2.
        budget: For ``"budget"``: a fraction in (0, 1] of what the regions save in plain training.

    Raises:
        ValueError: An unknown policy, ``k`` or ``budget`` out of range, missing, or given to another policy.
    """

    policy: Policy = "auto"
    k: int | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"checkpointing policy {self.policy!r} is unknown; choose one of {', '.join(POLICIES)}")
        self._check_argument("every_k", "k", self.k)
        self._check_argument("budget", "budget", self.budget)
        if self.k is not None and (isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1):
            raise ValueError(f"k={self.k!r} cannot count blocks; give a whole number of at least 2")
        if self.k == 1:
            raise ValueError(
                "k=1 leaves every block as it is and recomputes nothing; give a whole number of at least 2"
            )
        is_number = isinstance(self.budget, int | float) and not isinstance(self.budget, bool)
        if self.budget is not None and not (is_number and 0 < self.budget <= 1):
            raise ValueError(
                f"budget={self.budget!r} is not a fraction of the activation memory; give a number in (0, 1]"
            )

    def _check_argument(self, policy: str, name: str, value: float | None) -> None:
        if self.policy == policy and value is None:
            raise ValueError(f"policy {policy!r} has no {name}; give {name}=")
        if self.policy != policy and value is not None:
            raise ValueError(
                f"{name}={value!r} was given with policy {self.policy!r}, which does not read it; "
                f"use policy={policy!r} or leave {name} out"
            )
