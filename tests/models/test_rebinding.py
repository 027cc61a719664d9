"""Hooks and functions of a copied module act on the copy."""

import torch
from torch import nn

from lightning_memopt.models.copying import copy_module


class Hooked(nn.Module):
    """Reads what a hook of its own left, and calls functions that know it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(2, 2), []
        self.layer.register_forward_hook(lambda _, inputs, output: self.seen.append(output))
        self.twice = lambda x: 2 * self.layer(x)
        self.steps = [lambda x: self.twice(x), torch.relu]
        self.by_name = {"method": self.double}
        method = self.double
        self.calls = lambda x: method(x)

    def double(self, x):
        return 2 * self.layer(x)

    def forward(self, x):
        self.layer(x)
        return self.seen[-1]


def test_what_a_hook_leaves_is_left_in_the_copy():
    module, x = Hooked(), torch.ones(1, 2)
    module(x)
    copied = copy_module(module)
    with torch.no_grad():
        copied.layer.weight.zero_(), copied.layer.bias.fill_(3.0)
    assert (copied(x) == 3).all() and not (module(x) == 3).any()
    assert len(copied.seen) == 2 and len(module.seen) == 2


def test_functions_that_know_the_module_know_the_copy_however_deep():
    module, x = Hooked(), torch.ones(1, 2)
    copied = copy_module(module)
    with torch.no_grad():
        copied.layer.weight.zero_(), copied.layer.bias.fill_(3.0)
    for of in (copied.twice, copied.steps[0], copied.by_name["method"], copied.calls):
        assert (of(x) == 6).all()
    for of in (module.twice, module.steps[0], module.by_name["method"], module.calls):
        assert not (of(x) == 6).any()
    assert copied.steps[1] is torch.relu and copied.twice.__qualname__ == module.twice.__qualname__


def test_functions_that_know_nothing_of_the_module_stay_the_same_objects_and_share_what_they_count():
    module, calls = nn.Linear(2, 2), 0

    def count(*_):
        nonlocal calls
        calls += 1

    def endless(x):
        return x if x <= 0 else endless(x - 1)

    module.register_forward_hook(count)
    module.endless = endless
    copied = copy_module(module)
    copied(torch.ones(2)), module(torch.ones(2))
    assert calls == 2 and copied.endless is endless
