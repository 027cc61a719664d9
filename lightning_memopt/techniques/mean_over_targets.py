"""See what the losses of a step are means over: the targets of a cross-entropy that it does not ignore."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_memopt.techniques.counting import IGNORED_LABEL


class CountTargets(TorchFunctionMode):
    """Within the block, counts for each mean over class indices how many of them it counts.

    Attributes:
        counts: One integer tensor of no dimension for each such loss, in the order in which they were computed.

    Example:
        >>> with CountTargets() as seen:
        ...     loss = F.cross_entropy(torch.zeros(3, 5), torch.tensor([1, -100, 4]))
        >>> [int(count) for count in seen.counts]
        [2]
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.cross_entropy or func is F.nll_loss:
            self._look_at(*args, **kwargs)
        return result

    def _look_at(
        self,
        input: Any,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = IGNORED_LABEL,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        if reduction == "mean" and not target.is_floating_point():
            self.counts.append((target != ignore_index).sum())


def are_proportional(counts: list[list[Tensor]], weights: list[float]) -> bool:
    """Whether each loss of each micro-batch counts as many targets as the micro-batch weighs, or nothing tells.

    Args:
        counts: For each micro-batch those of its losses.
        weights: What each micro-batch weighs.
    """
    if not counts[0] or len({len(each) for each in counts}) > 1:
        return True
    shares = torch.stack([torch.stack(each) for each in counts]).cpu().double() / torch.tensor(weights).unsqueeze(1)
    return torch.allclose(shares, shares[:1].expand_as(shares), rtol=1e-5)
