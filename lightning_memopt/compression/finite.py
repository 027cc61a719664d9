"""Whether a tensor has numbers, and only such: a mean or a scale of others is no number, for all that share it."""

import math
from collections.abc import Iterable

from torch import Tensor

from lightning_memopt.models.fake import is_fake


def why_not_finite(tensor: Tensor) -> str:
    """What is not finite in ``tensor``, of a floating-point type; empty where all is, and where nothing is there."""
    if is_fake(tensor) or tensor.is_meta or tensor.element_size() == 1 or not tensor.numel():
        return ""
    lowest, highest = map(float, tensor.detach().aminmax())  # in one pass, and NaN where one is
    return "" if math.isfinite(lowest) and math.isfinite(highest) else "has elements that are NaN or infinite"


def check_materialized(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise a :class:`ValueError` where one of the named ``tensors`` has a shape and no numbers yet."""
    for name, tensor in tensors:
        if tensor.is_meta and not is_fake(tensor):
            raise ValueError(
                f"{name!r} is on the meta device, and has no numbers to compress. Make it first: "
                "module.to_empty(device=...), and load its state."
            )
