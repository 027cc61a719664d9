"""What is applied to weights after every step of their optimizers: masks, and clusters."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_memopt.compression.selection import Weight


class Held(ABC):
    """Something that weights must not lose while they train.

    Args:
        weights: The weights, from :func:`~lightning_memopt.compression.selection.select_weights`.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.weights = {weight.name: weight for weight in weights}
        self._hooks: list[RemovableHandle] = []

    @property
    @abstractmethod
    def found(self) -> bool:
        """Whether there is anything yet that they must not lose."""

    @abstractmethod
    def apply(self) -> None:
        """Bring the weights back to it."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What it is, by the name of the weight."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace it; the weights do not change."""

    def hold(self, optimizers: Iterable[Optimizer], after_step: Callable[[], None] | None = None) -> None:
        """Apply it after every step of ``optimizers``, until :meth:`remove`.

        Args:
            optimizers: Those that step the weights.
            after_step: To be called instead.
        """
        call = after_step or self.apply
        for optimizer in optimizers:
            self._hooks.append(optimizer.register_step_post_hook(lambda *_: call()))

    def remove(self) -> None:
        """Let the optimizers go; the weights stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
