"""Modules that keep what they computed can be copied."""

import threading

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn

from lightning_memopt.models.compiled import is_compiled
from lightning_memopt.models.copying import check_copyable, copy_module


def test_what_cannot_be_copied_is_told_without_copying_weights():
    net = nn.Sequential(nn.Linear(4, 4))
    net.kept = net(torch.ones(2, 4))
    net[0].weight.__class__ = Uncopied
    check_copyable(net)
    net[0].lock = threading.Lock()
    with pytest.raises(ValueError, match=r"Sequential cannot be copied .*lock.*__getstate__"):
        check_copyable(net)


class Uncopied(nn.Parameter):
    def __deepcopy__(self, memo):
        raise AssertionError("a weight was copied")


def test_tensors_kept_with_their_graph_are_copied_without_it_and_all_else_as_it_is():
    net = nn.Sequential(nn.Linear(4, 4))
    logits = net(torch.ones(2, 4))
    net[0].last = logits
    net.kept = {"losses": [logits.sum()], "pair": (logits, 1)}
    net.plain = torch.ones(2)
    copied = copy_module(net)
    assert torch.equal(copied[0].last, logits) and copied[0].last is not logits
    assert copied.kept["pair"][0] is copied[0].last and not copied.kept["losses"][0].requires_grad
    assert copied.plain is not net.plain and copied[0].weight is not net[0].weight and copied[0].weight.requires_grad
    assert net[0].last is logits and logits.grad_fn is not None


class Doubling(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((), 2.0))

    def forward(self, x):
        return self.factor * x

    def predict_step(self, x):
        return self(x) + 1


def _compiled_in_place(module):
    module.compile(backend="eager")
    return module


@pytest.mark.parametrize(
    "compiled", [_compiled_in_place, lambda module: from_compiled(torch.compile(module, backend="eager"))]
)
def test_a_copy_of_what_is_compiled_as_a_whole_runs_itself_and_not_the_original(compiled):
    module, one = compiled(Doubling()), torch.ones(())
    assert (module(one), module.predict_step(one)) == (2, 3)
    copied = copy_module(module)
    with torch.no_grad():
        copied.factor.fill_(5.0)
    assert (copied(one), copied.predict_step(one)) == (5, 6)
    assert (module(one), module.predict_step(one)) == (2, 3)
    assert not is_compiled(copied) and is_compiled(module)
    torch._dynamo.reset()


def test_methods_that_an_instance_had_before_it_was_compiled_are_those_of_the_copy():
    module = Doubling()
    module.forward = lambda x: x + 7
    copied = copy_module(from_compiled(torch.compile(module, backend="eager")))
    assert copied(torch.ones(())) == 8 and "predict_step" not in vars(copied)
