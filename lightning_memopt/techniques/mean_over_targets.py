"""See what the losses of a step are means over: the targets of a cross-entropy that it does not ignore."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_memopt.models.fake import is_fake
from lightning_memopt.techniques.counting import IGNORED_LABEL


class CountTargets(TorchFunctionMode):
    """Within the block, counts for each mean over class indices how many of them it counts.

    Attributes:
        counts: One integer tensor of no dimension for each such loss, in the order in which they were computed.
        compares_samples: Whether one of them is contrastive: each sample's class is its own place among the samples.

    Example:
        >>> import torch
        >>> with CountTargets() as seen:
        ...     loss = F.cross_entropy(torch.zeros(3, 5), torch.tensor([1, -100, 4]))
        >>> [int(count) for count in seen.counts]
        [2]
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[Tensor] = []
        self.compares_samples = False

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
            if tuple(input.shape) == (len(target), len(target)) and not is_fake(target):
                self.compares_samples |= target.tolist() == list(range(len(target)))


def are_proportional(counts: list[list[Tensor]], weights: list[float]) -> bool:
    """Whether each loss of each micro-batch counts as many targets as the micro-batch weighs, or nothing tells.

    Args:
        counts: For each micro-batch those of its losses.
        weights: What each micro-batch weighs, more than 0.
    """
    if len({len(each) for each in counts}) > 1 or any(is_fake(count) for each in counts for count in each):
        return True
    losses = zip(*([int(count) for count in each] for each in counts), strict=True)
    shares = [[count / weight for count, weight in zip(loss, weights, strict=True)] for loss in losses]
    return all(max(loss) - min(loss) <= 1e-5 * max(loss) for loss in shares)
