"""Code that reads a weight past the call of its module is found by what its methods name."""

import functools

import torch
from torch import nn
from torch.nn import functional as F

from lightning_memopt.models.weight_reads import find_weight_reads


def _decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class _Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.called = nn.Linear(4, 4)
        self.read = nn.Linear(4, 4)

    @_decorated
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.called(self.embed(tokens).to(self.called.weight.dtype))
        scale = (lambda: self.blocks[0].weight.sum())()
        return F.linear(hidden * scale, self.embed.weight)

    @property
    def norm(self) -> torch.Tensor:
        return self.read.bias.norm()

    def reset_parameters(self) -> None:
        self.called.weight.data.zero_()


class _Derived(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.missing_in_derived = None


def test_weights_read_in_decorated_methods_lambdas_properties_and_base_classes_are_found_by_name():
    module = nn.Sequential(_Derived())
    assert find_weight_reads(module) == {"0.embed": "_Derived", "0.blocks.0": "_Derived", "0.read": "_Derived"}


def test_torchs_own_layers_read_nothing_past_a_call():
    assert find_weight_reads(nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(4, 2), nn.LSTM(2, 2))) == {}
