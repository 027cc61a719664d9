"""Code that reads a weight past the call of its module is found by what its methods name."""

import functools

import torch
from torch import nn
from torch.nn import functional as F

from lightning_memopt.models.weight_reads import find_weight_reads, reads_own


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


class _Choosing(nn.Module):
    """As BLOOM does it: another way through, for a setting that nobody uses."""

    def __init__(self, parts: int = 1) -> None:
        super().__init__()
        self.parts, self.exact, self.step = parts, True, 0
        self.dense, self.later, self.positions = nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.step += 1
        if self.parts > 1 and self.exact:
            for part in self.dense.weight.chunk(self.parts):
                x = x + F.linear(x, part).sum()
        else:
            x = self.dense(x)
        x = self.get_sum(x)
        return F.linear(x, self.later.weight) if self.step > 1 else x

    def get_sum(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.positions.weight if self.training else x


def test_code_that_settings_leave_out_reads_nothing_and_what_may_change_is_no_setting():
    assert set(find_weight_reads(_Choosing())) == {"later", "positions"}
    assert set(find_weight_reads(_Choosing(parts=2))) == {"dense", "later", "positions"}


def test_a_parameter_that_is_there_for_its_name_is_not_read_by_its_module():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Linear(4, 4)
            self.bias = self.decoder.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.decoder(x)

    class Used(Named):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.bias

    assert not reads_own(Named(), "bias")
    assert reads_own(Used(), "bias")
