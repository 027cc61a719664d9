"""Operators that torch's ``DTensor`` cannot compute by itself."""

from functools import cache

import torch
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.experimental import register_sharding


@cache
def teach_operators() -> None:
    """Let ``DTensor`` compute what autograd asks of gradients where anomalies are detected; once for all."""

    @register_sharding(torch.ops.aten._is_any_true.default)
    def _whole(x: object) -> list[tuple[list[object], list[object]]]:
        return [([Replicate()], [Replicate()])]
