"""Trials of a smaller module: what does not run as it did is told."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_memopt.compression.cutting import Trials


class _Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.keys = 2

    def forward(self, x: Tensor) -> Tensor:
        keys = x[:, : self.keys]
        return F.scaled_dot_product_attention(x, keys, value=keys, enable_gqa=True)


def test_attention_without_heads_does_not_run():
    module = _Attends()
    trials = Trials(module, lambda module: module(torch.randn(1, 4, 5, 8)))
    assert trials.runs()
    module.keys = 0  # which torch computes zeros of, in the shape asked for
    assert not trials.runs()
